"""Branches and prompts, told by every tensor argument: what was kept for one prompt is never read for another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.broadcast.toy import EVERY_STEP, Pipe, Toy, noise, toy

STEPS = 9
CROSS = PABConfig(cross=Broadcast(6, EVERY_STEP))
POS, NEG = noise(3, 3), noise(4, 3)

Call = Callable[[Toy, Tensor, Tensor, Tensor], Tensor]


def by_keyword(model: Toy, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(hidden_states=x, timestep=t, encoder_hidden_states=text)


def by_position(model: Toy, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(x, t, text)


def in_a_list(model: Toy, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(x, t, [text])


def under_another_name(model: Toy, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(x, t, text, guidance={"mask": text})


CALLS = pytest.mark.parametrize("call", [by_keyword, by_position, in_a_list, under_another_name])


def sample(
    pipe: Pipe, call: Call, branches: Callable[[int], dict[str, Tensor]], named: bool = False
) -> dict[tuple[str, int], Tensor]:
    """The outputs of all calls."""
    outs: dict[tuple[str, int], Tensor] = {}
    pipe.scheduler.set_timesteps(STEPS)
    x = noise(0)
    for i, t in enumerate(pipe.scheduler.timesteps):
        for name, text in branches(i).items():
            with torch.no_grad(), pab.context(pipe.transformer, name) if named else torch.no_grad():
                out = outs[name, i] = call(pipe.transformer, x, t.expand(1), text)
        x = pipe.scheduler.step(out, t, x).prev_sample
    return outs


@CALLS
@pytest.mark.parametrize("order", [("uncond", "cond"), ("cond", "uncond")], ids="-".join)
def test_guidance_that_begins_late_reads_nothing_of_the_other_branch(call: Call, order: tuple[str, str]) -> None:
    texts = {"cond": POS, "uncond": torch.full_like(NEG, float("nan"))}
    pipe = Pipe(toy())
    pab.enable(pipe, CROSS)
    outs = sample(pipe, call, lambda i: {name: texts[name] for name in order if name == "cond" or i >= 4})
    for (name, i), out in outs.items():
        if name == "uncond":
            assert out.isnan().all(), i
    assert outs["cond", 0].isfinite().all() and outs["cond", 3].isfinite().all() and outs["cond", 4].isfinite().all()


@CALLS
def test_guidance_that_ends_early_leaves_the_other_branch_what_it_kept(call: Call) -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CROSS)
    sample(pipe, call, lambda i: {"uncond": NEG, "cond": POS} if i < 4 else {"cond": POS})
    assert pab.summary(pipe).forced == 0


@CALLS
def test_branches_in_another_order_at_some_steps_keep_their_slots(call: Call) -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CROSS)
    sample(pipe, call, lambda i: {"cond": POS, "uncond": NEG} if i % 3 else {"uncond": NEG, "cond": POS})
    assert pab.summary(pipe).forced == 0 and len(pab.summary(pipe).contexts) == 2


@CALLS
@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
@pytest.mark.parametrize(("at", "kept_alive"), [(1, True), (4, True), (4, False)])
def test_a_prompt_exchanged_half_way_is_read_at_once(call: Call, named: bool, at: int, kept_alive: bool) -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CROSS)
    prompts = [noise(11, 3)]

    def branches(i: int) -> dict[str, Tensor]:
        if i == at:
            prompts.append(torch.full_like(NEG, float("nan")))
            if not kept_alive:
                del prompts[0]
        return {"cond": prompts[-1]}

    outs = sample(pipe, call, branches, named)
    assert all(out.isnan().all() == (i >= at) for (_, i), out in outs.items() if i <= at)
    assert pab.summary(pipe).forced > 0


def test_a_prompt_written_over_half_way_is_read_at_once() -> None:
    pipe, prompt = Pipe(toy()), noise(11, 3)
    pab.enable(pipe, CROSS)

    def branches(i: int) -> dict[str, Tensor]:
        if i == 4:
            prompt.fill_(float("nan"))
        return {"cond": prompt}

    outs = sample(pipe, by_keyword, branches)
    assert outs["cond", 3].isfinite().all() and outs["cond", 4].isnan().all()


def test_inputs_that_are_written_over_at_every_step_are_no_other_prompts() -> None:
    """As where somebody replays a graph of their own around the model."""
    model, static = toy(), [noise(0), torch.zeros(1), noise(3, 3)]
    pab.enable(model, PABConfig(cross=Broadcast(3, EVERY_STEP)), num_steps=STEPS)
    with torch.no_grad():
        for i in range(STEPS):
            for held, now in zip(static, (noise(i), torch.tensor([9.0 - i]), POS), strict=True):
                held.copy_(now)
            model(*static)
    assert pab.summary(model).forced == 0


def test_branches_in_another_order_keep_their_slots_though_one_has_another_prompt_at_every_step() -> None:
    pipe, texts = Pipe(toy()), [noise(20 + i, 3) for i in range(STEPS)]
    pab.enable(pipe, CROSS)
    sample(pipe, by_keyword, lambda i: {"cond": POS, "uncond": texts[i]} if i else {"uncond": texts[i], "cond": POS})
    uncond, cond = (pab.summary(pipe).contexts[f"#{i}"]["cross"] for i in range(2))
    assert uncond.reused == 0 and cond.forced == 0


def test_a_flag_that_is_another_one_half_way_is_computed_with() -> None:
    model = toy()
    pab.enable(model, CROSS, num_steps=2)
    with torch.no_grad():
        for i, flag in enumerate(("front", "side")):
            model(noise(i), torch.tensor([9.0 - i]), POS, guidance=flag)
    assert pab.summary(model).contexts["#0"]["cross"].forced == 2


class TimestepFirst(Toy):
    def forward(self, timestep: Tensor, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, timestep, encoder_hidden_states)


@pytest.mark.parametrize("by_name", [True, False])
def test_latents_behind_the_timestep_are_no_prompt(by_name: bool) -> None:
    model = TimestepFirst().eval().requires_grad_(False)
    pab.enable(model, CROSS, num_steps=STEPS)
    latents = [noise(i) for i in range(STEPS)]  # all are kept alive
    with torch.no_grad():
        for i, x in enumerate(latents):
            t = torch.tensor([9.0 - i])
            model(timestep=t, hidden_states=x, encoder_hidden_states=POS) if by_name else model(t, x, POS)
    assert pab.summary(model).forced == 0


def test_text_keys_and_values_are_those_of_the_prompt_that_is_there() -> None:
    from pab_kernels.nn import PABCrossAttention

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = PABCrossAttention(32, 1, text_channels=8)

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return x + self.cross(x, text)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().eval().requires_grad_(False)
    plain = [model(torch.ones(1, 4, 32), torch.zeros(1), text) for text in (POS, NEG)]
    pab.enable(model, PABConfig(cross=Broadcast(4, EVERY_STEP)))
    with torch.no_grad(), pab.generation(model, num_steps=6), pab.context(model, "cond"):
        for i in range(6):
            out = model(torch.ones(1, 4, 32), torch.tensor([9.0 - i]), POS if i < 3 else NEG)
            assert torch.allclose(out, plain[i >= 3], atol=1e-6), i
