"""Blocks in a row that share one slot, of what all of them add to the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.between_blocks import Between
from tests.adapters import tiny_stdit3
from tests.adapters.tiny_pipes import named
from tests.broadcast.chained import SUBLAYERS, Block, Model, X, directly

pytestmark = [
    pytest.mark.flops,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' schedulers hand tensors to numpy
]

STEPS = 8
HOLD = PABConfig(block=Broadcast(3, (0, 1)))
LINEAR = PABConfig(block=Broadcast(2, (0, 1), reuse="linear"), spatial=2)


def changed(model: Model, x: Tensor) -> Any:
    a, b, c, d = model.blocks
    return d(c(b(a(x)) * 2))


def changed_in_place(model: Model, x: Tensor) -> Any:
    a, b, c, d = model.blocks
    x = b(a(x))
    x += 1
    return d(c(x))


def read(model: Model, x: Tensor) -> Any:
    a, b, c, d = model.blocks
    x = b(a(x))
    return d(c(x)) + x.mean()


def skipped(model: Model, x: Tensor) -> Any:
    a, b, c, d = model.blocks
    y = a(x)
    return d(c(b(y)), skip=y)


def collected(model: Model, x: Tensor) -> Any:
    a, b, c, d = model.blocks
    y = b(a(x))
    return d(c(y)), y


def twice(model: Model, x: Tensor) -> Any:
    a, b, c, d = model.blocks
    return d(c(b(b(a(x)))))


@pytest.mark.parametrize(
    ("forward", "follows"),
    [
        (directly, {0: 1, 1: 2, 2: 3}),
        (changed, {0: 1, 2: 3}),
        (changed_in_place, {0: 1, 2: 3}),
        (read, {0: 1, 2: 3}),
        (skipped, {1: 2, 2: 3}),
        (collected, {0: 1, 2: 3}),
        (twice, {2: 3}),
    ],
)
def test_what_follows_directly_is_found(forward: Callable[[Model, Tensor], Any], follows: dict[int, int]) -> None:
    model = Model(forward)
    with torch.no_grad(), Between(model, SUBLAYERS) as between:
        between.returned(model(X))
    assert between.follows == {f"blocks.{a}": f"blocks.{b}" for a, b in follows.items()}
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def outputs(model: nn.Module, call: Callable[[int], Any], steps: int = STEPS) -> list[Tensor]:
    with torch.no_grad(), pab.generation(model, num_steps=steps):
        return [out[0] if isinstance(out, tuple) else out for out in map(call, range(steps))]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def spans_of(model: Any) -> list[int]:
    """The lengths of the spans of the latest plan."""
    plan = pab.summary(model).plan
    assert plan is not None and plan.given_up is not None and not plan.given_up.fewer_bits
    return [len(span) for span in plan.given_up.spans]


@pytest.mark.parametrize("rules", [HOLD, LINEAR])
@pytest.mark.parametrize(
    ("forward", "lengths"), [(directly, [4]), (changed, [2, 2]), (collected, [2, 2]), (skipped, [3])]
)
def test_blocks_that_share_a_slot_add_what_they_add_with_slots_of_their_own(
    forward: Callable[[Model, Tensor], Any], lengths: list[int], rules: PABConfig
) -> None:
    model = Model(forward)
    pab.enable(model, rules)
    wanted = outputs(model, lambda step: model(X + step))
    whole = pab.summary(model)
    pab.enable(model, budget=whole.peak_cache_bytes - 1)
    for _ in range(2):
        found, summary = outputs(model, lambda step: model(X + step)), pab.summary(model)
        assert difference(found, wanted) < 1e-12
        assert sorted(spans_of(model)) == sorted(lengths)
        assert summary.plan is not None and summary.plan.given_up is not None
        assert summary.peak_cache_bytes == summary.plan.given_up.peak < whole.peak_cache_bytes
        assert summary.flops == whole.flops and not summary.forced and not summary.cache_bytes


@pytest.mark.parametrize("rules", [HOLD, LINEAR])
@pytest.mark.parametrize("name", ["WanPipeline", "CogVideoXPipeline", "FluxPipeline", "HunyuanVideoPipeline"])
def test_families_with_one_and_with_two_streams(name: str, rules: PABConfig) -> None:
    tiny = named(name)
    pipe = tiny.build()
    pab.enable(pipe, rules)
    wanted, whole = tiny.sample(pipe, STEPS), pab.summary(pipe)
    pab.enable(pipe, budget=whole.peak_cache_bytes - 1)
    found, summary = tiny.sample(pipe, STEPS), pab.summary(pipe)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert len(spans_of(pipe)) == 1 and not summary.forced and summary.share == whole.share
    assert summary.peak_cache_bytes < whole.peak_cache_bytes


@pytest.mark.parametrize("rules", [HOLD, LINEAR])
def test_blocks_on_the_residual_stream(rules: PABConfig) -> None:
    model = tiny_stdit3.tiny_stdit3(torch.float64)
    conditions = tiny_stdit3.conditions(batch=1, dtype=torch.float64)
    x = torch.randn(1, 4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def call(step: int) -> Tensor:
        text = tiny_stdit3.text(batch=1, dtype=torch.float64)
        return model(x + step, torch.full((1,), 900.0 - step, dtype=torch.float64), text, **conditions)

    pab.enable(model, rules)
    wanted, whole = outputs(model, call), pab.summary(model)
    pab.enable(model, budget=whole.peak_cache_bytes - 1)
    found, summary = outputs(model, call), pab.summary(model)
    assert difference(found, wanted) < 1e-6  # its output has float32
    assert spans_of(model) == [4] and not summary.forced
    assert summary.plan is not None and summary.plan.given_up is not None
    assert summary.peak_cache_bytes == summary.plan.given_up.peak < whole.peak_cache_bytes


def test_in_8_bits() -> None:
    model = Model(directly)
    pab.enable(model, HOLD)
    wanted = outputs(model, lambda step: model(X + step))
    pab.enable(model, budget=X.nbytes - 1)
    found, plan = outputs(model, lambda step: model(X + step)), pab.summary(model).plan
    assert plan is not None and plan.given_up is not None and plan.given_up.fewer_bits == ("blocks.3",)
    assert pab.summary(model).peak_cache_bytes == plan.given_up.peak == 5 * (8 + 4)
    pab.enable(model, PABConfig(block=HOLD.block, cache_dtype="int8"))
    each = outputs(model, lambda step: model(X + step))
    assert 0 < difference(found, wanted) < 2 * difference(each, wanted)


def test_something_that_comes_between_later_makes_blocks_compute_and_have_slots_of_their_own() -> None:
    model, plain = Model(directly), Model(directly)
    pab.enable(model, PABConfig(block=Broadcast(4, (0, 1))), budget=3 * X.nbytes)

    def call(step: int) -> Tensor:
        if step == 2:
            model.run = changed
        return model(X + step)

    found = outputs(model, call, 12)
    summary = pab.summary(model)
    assert summary.forced > 0 and summary.contexts["#0"]["block"].reused > 0
    assert summary.peak_cache_bytes <= 3 * X.nbytes
    assert difference(found[:1], [plain(X)]) < 1e-12
    plain.run = changed
    for step in (4, 5):  # stored as a span in vain at 4, so that 5 computes
        torch.testing.assert_close(found[step], plain(X + step), rtol=0, atol=1e-12)


class Promoting(Block):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return super().forward(x.double())


@pytest.mark.parametrize("rules", [HOLD, LINEAR])
def test_a_block_that_changes_the_dtype_of_the_stream_shares_nothing(rules: PABConfig) -> None:
    model, plain = Model(directly), Model(directly)
    for each in (model, plain):
        each.blocks[0] = Promoting().double().eval().requires_grad_(False)
        each.blocks[0].load_state_dict(model.blocks[0].state_dict())
    pab.enable(model, rules, budget=3 * X.nbytes)
    found = outputs(model, lambda step: model(X.float() + step))
    computed = plain(X.float() + 1)  # at step 1, as what step 0 stored was not shared
    plan = pab.summary(model).plan
    assert plan is not None and plan.given_up is not None and not plan.given_up.spans
    assert difference(found[1:2], [computed]) < 1e-12


@pytest.mark.parametrize("hook", [lambda *given: 2 * given[2], lambda *given: given[2].mul_(2)])
def test_a_hook_that_comes_before_a_reuse_ends_the_span_at_once(hook: Callable[..., Tensor]) -> None:
    model, twin = Model(directly), Model(directly)
    pab.enable(model, PABConfig(block=Broadcast(4, (0, 1))), budget=3 * X.nbytes)
    with torch.no_grad(), pab.generation(model, num_steps=8):
        for step in range(2):
            model(X + step)
        for each in (model, twin):
            each.blocks[1].register_forward_hook(hook)
        x = X + 2
        torch.testing.assert_close(model(x), twin(X + 2), rtol=0, atol=1e-12)
        assert torch.equal(x, X + 2)


def test_blocks_with_hooks_and_compiled_ones_share_nothing() -> None:
    model = Model(directly)
    model.blocks[1].register_forward_hook(lambda module, args, out: 2 * out)
    model.blocks[3].compile(backend="eager")
    pab.enable(model, HOLD)
    wanted = outputs(model, lambda step: model(X + step))
    pab.enable(model, budget=3 * X.nbytes)
    found, plan = outputs(model, lambda step: model(X + step)), pab.summary(model).plan
    assert plan is not None and plan.given_up is not None and not plan.given_up.spans and plan.given_up.fewer_bits
    assert difference(found, wanted) < 0.2


def test_an_interrupted_call_leaves_nothing_to_add() -> None:
    model = Model(directly)
    pab.enable(model, HOLD)
    wanted = outputs(model, lambda step: model(X + step))
    pab.enable(model, budget=X.nbytes)
    handle = model.blocks[2].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        outputs(model, lambda step: model(X + step))
    handle.remove()
    assert pab.summary(model).cache_bytes == 0
    assert difference(outputs(model, lambda step: model(X + step)), wanted) < 1e-12
