"""Pipelines with a second transformer: PAB on both, each with a plan over its own steps."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.attach import is_stand_in
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.broadcast.names import named as name_of
from pab_kernels.broadcast.pipeline import left_at
from tests.adapters.tiny_pipes import Pipe, embedding, named, transformer
from tests.broadcast.sampled_pipelines import CONFIG, RULES
from tests.record_and_replay import replay_of_pipeline, replaying

STEPS = 9
MODELS = ("transformer", "transformer_2")


def wan(boundary: float | None = 0.8, scheduler: Any = None, **parts: Any) -> Pipe:
    tiny = named("WanPipeline")

    def made() -> dict[str, Any]:
        second = transformer("WanTransformer3DModel")
        for p in second.parameters():
            p.data = p.data.flip(0)
        found = tiny.parts() | {"transformer_2": second, "boundary_ratio": boundary} | parts
        return found | ({} if scheduler is None else {"scheduler": scheduler()})

    return replace(tiny, parts=made)


def hand_over(pipe: Any) -> int:
    """The first step below the boundary, said by the schedule."""
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    return sum(float(t) >= boundary for t in pipe.scheduler.timesteps)


@pytest.mark.flops
@pytest.mark.parametrize("scheduler", [None, diffusers.FlowMatchHeunDiscreteScheduler], ids=["UniPC", "second order"])
def test_each_transformer_has_its_own_steps_and_both_are_the_oracle(scheduler: Any) -> None:
    tiny = wan(scheduler=scheduler)
    pipe, twin = tiny.build(), tiny.build()
    plain = tiny.sample(pipe, STEPS)
    total, first = len(pipe.scheduler.timesteps), hand_over(pipe)
    assert 2 < first < total - 3
    pab.enable(pipe, PABConfig(1, 1, 1, 1, 1))
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
    pab.enable(pipe, CONFIG)
    sublayers = pab.sublayers(pipe)
    oracles = {
        "transformer": replay_of_pipeline(twin, sublayers, RULES),
        "transformer_2": replay_of_pipeline(twin, sublayers, RULES, first, twin.transformer_2),
    }
    with contextlib.ExitStack() as stack:
        for oracle in oracles.values():
            stack.enter_context(replaying(twin, oracle, entered=0))
        expected = tiny.sample(twin, STEPS)
    for _ in range(2):
        assert torch.equal(tiny.sample(pipe, STEPS), expected)
        summary = pab.summary(pipe)
        assert list(summary.models) == list(MODELS) and summary.plan is None
        for name, own in summary.models.items():
            steps = range(first) if name == "transformer" else range(first, total)
            assert own.plan is not None and own.plan.steps == steps and own.plan.schedule.num_steps == total
            assert own.forced == 0 and own.cache_bytes == 0 and own.peak_cache_bytes > 0
            for context, tallies in own.contexts.items():
                assert summary.contexts[f"{name}: {context}"] == tallies
                for kind, c in own.plan.counts().items():
                    assert (tallies[kind].computed, tallies[kind].stored, tallies[kind].reused) == (
                        c.computed,
                        c.stored,
                        c.reused,
                    )
                    assert tallies[kind].computed == oracles[name].counts[context, kind, "computed"]
    assert len(summary.contexts) == 4
    assert summary.peak_cache_bytes == sum(s.peak_cache_bytes for s in summary.models.values())
    assert summary.flops == sum(s.flops for s in summary.models.values()) and 0 < summary.share < 1
    as_dict, plans = summary.to_dict(), [s.plan for s in summary.models.values() if s.plan is not None]
    assert as_dict["contexts"].keys() == summary.contexts.keys()
    assert set(as_dict["notes"]) == {note for plan in plans for note in plan.notes} and len(
        set(as_dict["notes"])
    ) == len(as_dict["notes"])
    pab.disable(pipe)
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()
    for name in MODELS:
        assert not any(is_stand_in(v) for m in getattr(pipe, name).modules() for v in vars(m).values())
    with pytest.raises(RuntimeError, match="PAB is not enabled"):
        pab.summary(pipe)


def test_slots_of_the_first_are_let_go_where_the_second_takes_over() -> None:
    """And none is made that no step of its own reads."""
    tiny = wan()
    pipe = tiny.build()
    pab.enable(pipe, PABConfig(spatial=Broadcast(100, (0, 1))))
    held: list[tuple[int, int]] = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        held.append(tuple(s.cache_bytes for s in pab.summary(pipe).models.values()))  # type: ignore[arg-type]
        return tensors

    tiny.sample(pipe, STEPS, callback_on_step_end=look)
    first = hand_over(pipe)
    assert all(a > 0 and b == 0 for a, b in held[: first - 1])
    assert held[first - 1] == (0, 0)
    assert all(a == 0 and b > 0 for a, b in held[first:-1])
    assert held[-1] == (0, 0)


def test_a_run_interrupted_on_either_side_leaves_nothing_for_the_next() -> None:
    tiny = wan()
    pipe = tiny.build()
    pab.enable(pipe, CONFIG)
    clean = tiny.sample(pipe, STEPS)
    for last in (1, hand_over(pipe), STEPS - 2):

        def interrupt(pipe: Any, i: int, t: Any, tensors: dict[str, Any], last: int = last) -> dict[str, Any]:
            pipe._interrupt = i == last
            return tensors

        tiny.sample(pipe, STEPS, seed=1, callback_on_step_end=interrupt)
        assert pab.summary(pipe).cache_bytes == 0
        assert torch.equal(tiny.sample(pipe, STEPS), clean)
        assert pab.summary(pipe).forced == 0


def test_the_boundary_is_the_one_that_the_pipeline_has_when_the_run_begins() -> None:
    tiny = wan(0.99)
    pipe = tiny.build()
    pab.enable(pipe, CONFIG)
    for boundary in (0.99, 0.3, 0.8):
        pipe.register_to_config(boundary_ratio=boundary)
        expected = wan(boundary).build()
        pab.enable(expected, CONFIG)
        assert torch.equal(tiny.sample(pipe, STEPS), tiny.sample(expected, STEPS))
        assert pab.summary(pipe) == pab.summary(expected)


@pytest.mark.parametrize(("boundary", "end"), [(0.5, 3), (0.49, 3), (0.51, 2), (0.0, 4), (1.0, 1), (1.1, 0), (None, 4)])
def test_a_timestep_on_the_boundary_is_of_the_first(boundary: float | None, end: int) -> None:
    models = {name: torch.nn.Linear(1, 1) for name in MODELS}
    scheduler = SimpleNamespace(
        timesteps=torch.tensor([1000.0, 750.0, 500.0, 250.0]), config=SimpleNamespace(num_train_timesteps=1000)
    )
    pipe = SimpleNamespace(scheduler=scheduler, config=SimpleNamespace(boundary_ratio=boundary), **models)
    assert left_at(pipe, models["transformer"]) == end
    assert left_at(pipe, models["transformer_2"]) == 4


@pytest.mark.flops
def test_a_model_that_is_never_called_has_no_plan() -> None:
    tiny = wan(None)
    pipe = tiny.build()
    pab.enable(pipe, CONFIG)
    tiny.sample(pipe, STEPS)
    summary = pab.summary(pipe)
    assert summary.models["transformer_2"].plan is None and list(summary.contexts) == [
        "transformer: cond",
        "transformer: uncond",
    ]
    assert summary.models["transformer"].plan is not None and summary.models["transformer"].plan.steps == range(STEPS)
    assert "transformer_2: not called" in str(summary) and "transformer: 9 steps, " in str(summary)
    assert 0 < summary.flops == summary.models["transformer"].flops < summary.flops_without
    for boundary, called in ((1.0, "transformer_2"), (0.0, "transformer")):
        pipe.register_to_config(boundary_ratio=boundary)
        tiny.sample(pipe, STEPS)
        plans = {name: s.plan for name, s in pab.summary(pipe).models.items() if s.plan is not None}
        assert list(plans) == [called] and len(plans[called].steps) == STEPS


def test_a_pipeline_with_only_one_of_the_two() -> None:
    tiny = wan(1.0, transformer=None)
    pipe = tiny.build()
    plain = tiny.sample(pipe, STEPS)
    pab.enable(pipe, CONFIG)
    assert not torch.equal(tiny.sample(pipe, STEPS), plain)
    summary = pab.summary(pipe)
    assert list(summary.contexts) == ["cond", "uncond"] and summary.plan is not None and summary.forced == 0
    pab.disable(pipe)
    assert torch.equal(tiny.sample(pipe, STEPS), plain)


def test_a_pipeline_that_takes_the_first_to_the_end_makes_its_plan_whole() -> None:
    """Two pipelines share a scheduler and a transformer, which one of them hands over and the other does not."""
    tiny = wan()
    pipe = tiny.build()
    other = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=pipe.transformer, scheduler=pipe.scheduler
    )
    other.set_progress_bar_config(disable=True)
    pab.enable(pipe, CONFIG)
    pab.enable(other)
    tiny.sample(other, STEPS)
    assert pab.summary(other).forced == 0 and len(pab.summary(other).plan.steps) == STEPS  # type: ignore[union-attr]
    tiny.sample(pipe, STEPS)
    assert pab.summary(pipe).cache_bytes == 0


def test_a_config_that_the_second_refuses_leaves_the_first_as_it_was() -> None:
    pipe = wan().build()
    pab.enable(pipe.transformer, PABConfig(spatial=2))
    odd = wan(transformer_2=torch.nn.Linear(2, 2)).build()
    with pytest.raises(TypeError, match="no attention was found"):
        pab.enable(odd, CONFIG)
    assert broadcaster_of(odd.transformer) is None and "step" not in vars(odd.scheduler)
    odd.transformer = pipe.transformer
    with pytest.raises(TypeError, match="no attention was found"):
        pab.enable(odd, CONFIG)
    kept = broadcaster_of(pipe.transformer)
    assert kept is not None and kept.config == PABConfig(spatial=2)
    assert "step" not in vars(odd.scheduler)
    pab.enable(pipe, CONFIG)
    pipe.transformer_2, second = odd.transformer_2, pipe.transformer_2
    with pytest.raises(TypeError, match="no attention was found"):
        pab.enable(pipe)
    assert is_stand_in(vars(pipe.scheduler)["step"])
    pipe.transformer_2 = second
    pab.disable(pipe)
    assert "step" not in vars(pipe.scheduler)


class Reading(torch.nn.Module):
    """A part of a model that reads a value, for which there is none on the meta device."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> Any:
        return self.part(x) if x.isfinite().all() else None


@pytest.mark.flops
def test_a_sum_of_flops_is_not_told_where_those_of_one_are_not_known() -> None:
    tiny = wan()
    pipe = tiny.build()
    pipe.transformer_2.rope = Reading(pipe.transformer_2.rope)
    pab.enable(pipe, CONFIG)
    tiny.sample(pipe, STEPS)
    summary = pab.summary(pipe)
    assert summary.models["transformer"].share < 1 and summary.models["transformer_2"].flops_without == 0
    assert (summary.flops, summary.flops_without, summary.share) == (0, 0, 1) and "FLOPs" not in str(summary)


def test_a_context_is_of_both_and_a_generation_of_a_bare_module_of_one() -> None:
    pipe = wan().build()
    pab.enable(pipe, CONFIG)
    with pab.context(pipe, "mine"):
        for name in MODELS:
            assert name_of(broadcaster_of(getattr(pipe, name))) == ("mine", None)  # type: ignore[union-attr]
    with (
        pytest.raises(ValueError, match="this pipeline has transformer, transformer_2; pass one of them"),
        pab.generation(pipe, num_steps=2),
    ):
        pass


def test_a_transformer_for_each_branch_has_every_step() -> None:
    """Ideogram 4: another model for the unconditional branch, which sees the image alone."""
    tokens, text = 4 * 3, 5
    config = {
        "in_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config |= {"adaln_dim": 8, "llm_features_dim": 6, "mrope_section": (2, 1, 1)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [diffusers.Ideogram4Transformer2DModel(**config).eval().requires_grad_(False) for _ in range(2)]
    pipe = diffusers.Ideogram4Pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, *models)
    pipe.set_progress_bar_config(disable=True)
    indicator = torch.tensor([[3] * text + [2] * tokens])
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(3))
    prompt = (
        torch.cat([embedding(1, text, 6), torch.zeros(1, tokens, 6)], 1),
        torch.cat([torch.zeros(text, 3, dtype=torch.long), positions])[None],
        torch.zeros(1, text + tokens, dtype=torch.long),
        indicator,
    )
    pipe.encode_prompt = lambda **_: prompt  # a language model is left out

    def sample() -> Any:
        call = {"prompt": "a", "height": 64, "width": 48, "num_inference_steps": 6, "max_sequence_length": text}
        call |= {"guidance_scale": 4.0, "guidance_schedule": None, "output_type": "latent"}
        with torch.no_grad():
            return pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]

    plain = sample()
    pab.enable(pipe, PABConfig(1, 1, 1, 1, 1))
    assert torch.equal(sample(), plain)
    pab.enable(pipe, CONFIG)
    first = sample()
    assert torch.equal(sample(), first) and not torch.equal(first, plain)
    summary = pab.summary(pipe)
    assert list(summary.contexts) == ["transformer: #0", "unconditional_transformer: #0"] and summary.forced == 0
    for own in summary.models.values():
        assert own.plan is not None and own.plan.steps == range(6)
        tally = own.contexts["#0"]["spatial"]
        assert (
            (tally.computed, tally.reused)
            == (own.plan.counts()["spatial"].computed, own.plan.counts()["spatial"].reused)
            == (6, 6)
        )
    pab.disable(pipe)
    assert torch.equal(sample(), plain)
