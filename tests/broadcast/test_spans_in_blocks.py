"""Sublayers in a row on the stream of a block that share one slot, of what all of them add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters import tiny_latte, tiny_stdit3
from tests.adapters.tiny_models import FAMILIES
from tests.broadcast.toy import noise as toy_noise
from tests.broadcast.toy import toy
from tests.oracle import Oracle, Rule

pytestmark = pytest.mark.flops

STEPS = 8
BOTH = ("cond", "uncond")
ATTENTION, LAST_TWO, ALL = ("spatial", "temporal", "cross"), ("cross", "mlp"), ("spatial", "temporal", "cross", "mlp")
Call = Callable[[int, str], Tensor]


def rules(kinds: Sequence[str], reuse: Any = "hold", reach: int = 3, **options: Any) -> PABConfig:
    same = Broadcast(reach, (0, 1), reuse=reuse)
    return PABConfig(rules=tuple((kind, same) for kind in kinds), cache_point="post_gate", **options)  # type: ignore[misc]


def latte(dtype: torch.dtype = torch.float64) -> tuple[Any, Call]:
    model = tiny_latte.tiny_latte(dtype)

    def call(step: int, name: str) -> Tensor:
        text = tiny_latte.prompt(BOTH.index(name), dtype)
        out: Tensor = model(tiny_latte.noise(step, dtype=dtype), torch.tensor([900 - step]), text).sample
        return out

    return model, call


def stdit3(dtype: torch.dtype = torch.float32) -> tuple[Any, Call]:
    """Both branches of guidance in one batch, if it is called in one context."""
    model = tiny_stdit3.tiny_stdit3(dtype)
    fixed = tiny_stdit3.conditions(dtype=dtype)

    def call(step: int, name: str) -> Tensor:
        text = tiny_stdit3.text(BOTH.index(name), dtype=dtype)
        t = torch.full((2,), 900.0 - step, dtype=dtype)
        out: Tensor = model(tiny_stdit3.noise(step, dtype=dtype), t, text, **fixed)
        return out

    return model, call


def allegro() -> tuple[Any, Call]:
    tiny = next(tiny for tiny in FAMILIES if tiny.name.startswith("Allegro"))
    model = tiny.build()

    def call(step: int, name: str) -> Tensor:
        out: Tensor = model(**tiny(step % 4))[0]
        return out

    return model, call


def run(model: Any, call: Call, names: Sequence[str] = BOTH, late: int = 0) -> list[Tensor]:
    """What the model gives; all contexts but the first are called from step `late` on."""
    found = []
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            for name in names[: None if step >= late else 1]:
                with pab.context(model, name, step):
                    found.append(call(step, name))
    return found


def under(config: PABConfig, model: Any, call: Call, **options: Any) -> tuple[list[Tensor], Any]:
    """What the model gives, and the summary; in a second run, in which a budget knows the number of contexts."""
    pab.enable(model, config)
    run(model, call, **options)
    return run(model, call, **options), pab.summary(model)


def with_and_without(build: Callable[[], tuple[Any, Call]], config: PABConfig, **options: Any) -> Any:
    """What the model gives with shared slots and with slots of their own, and the two summaries."""
    wanted, whole = under(config, *build(), **options)
    found, summary = under(replace(config, budget=whole.peak_cache_bytes - 1), *build(), **options)
    assert summary.peak_cache_bytes < whole.peak_cache_bytes
    return found, wanted, summary, whole


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, wanted, strict=True))


def largest(outputs: list[Tensor]) -> float:
    return max(float(out.abs().max()) for out in outputs)


def given_up(summary: Any) -> Any:
    assert summary.plan is not None and summary.plan.given_up is not None
    return summary.plan.given_up


def sharing(summary: Any) -> list[str]:
    """The parts of each span, in a word, such as "attn1 attn2"."""
    return [" ".join(name.rpartition(".")[2] for name in span) for span in given_up(summary).spans]


@pytest.mark.parametrize(
    ("build", "kinds", "reuse", "names", "shared"),
    [
        (latte, ATTENTION, "hold", BOTH, {"attn1 attn2"}),
        (latte, LAST_TWO, "linear", BOTH[:1], {"attn2 ff"}),
        (latte, ALL, "hold", BOTH[:1], {"attn1 attn2 ff", "attn1 ff"}),  # temporal blocks have no cross attention
        (latte, ALL, "linear", BOTH, {"attn1 attn2 ff", "attn1 ff"}),
        (stdit3, ATTENTION, "linear", BOTH[:1], {"attn cross_attn"}),
        (stdit3, ALL, "hold", BOTH, {"attn cross_attn mlp"}),
        (allegro, ATTENTION, "hold", BOTH[:1], {"attn1 attn2"}),
    ],
)
def test_sublayers_that_share_a_slot_add_what_they_add_with_slots_of_their_own(
    build: Callable[[], tuple[Any, Call]], kinds: Sequence[str], reuse: str, names: Sequence[str], shared: set[str]
) -> None:
    found, wanted, summary, whole = with_and_without(build, rules(kinds, reuse), names=names)
    assert difference(found, wanted) < (1e-12 if wanted[0].dtype == torch.float64 else 1e-5)
    spans = given_up(summary).spans
    assert set(sharing(summary)) == shared and not given_up(summary).fewer_bits and not given_up(summary).computed
    assert summary.peak_cache_bytes == given_up(summary).peak and not summary.cache_bytes
    assert summary.flops == whole.flops and not summary.forced
    assert f"{sum(map(len, spans))} sublayers share {len(spans)} slot(s)" in str(summary)


@pytest.mark.parametrize(("build", "blocks"), [(latte, 0), (stdit3, 1)])
def test_sublayers_of_blocks_that_are_reused_too(build: Callable[[], tuple[Any, Call]], blocks: int) -> None:
    config = rules(ALL, reach=4, block=Broadcast(2, (0.5, 0.9)))
    found, wanted, summary, whole = with_and_without(build, config, names=BOTH[:1])
    assert difference(found, wanted) < (1e-12 if wanted[0].dtype == torch.float64 else 1e-5)
    assert len(given_up(summary).spans) == 4 + blocks and summary.peak_cache_bytes == given_up(summary).peak
    assert summary.flops == whole.flops and not summary.forced


def test_the_oracle_says_the_same() -> None:
    kinds, steps = ("spatial", "cross", "mlp"), [900.0 - step for step in range(STEPS)]
    model, call = latte()
    oracle = Oracle(model, {kind: Rule(3, (0, 1)) for kind in kinds}, steps, post_gate=True)

    def replayed(step: int, name: str) -> Tensor:
        text = tiny_latte.prompt(BOTH.index(name), torch.float64)
        return oracle(name, step, tiny_latte.noise(step, dtype=torch.float64), torch.tensor([900 - step]), text)

    with torch.no_grad():
        wanted = [replayed(step, name) for step in range(STEPS) for name in BOTH]
    found, summary = under(rules(kinds, budget=300_000), model, call)
    assert set(sharing(summary)) == {"attn1 attn2 ff"} and difference(found, wanted) < 1e-12


@pytest.mark.parametrize("reuse", ["hold", "linear"])
def test_a_context_that_comes_late_computes_first(reuse: str) -> None:
    found, wanted, summary, whole = with_and_without(latte, rules(ALL, reuse), late=4)
    assert difference(found, wanted) < 1e-12 and sharing(summary)
    assert summary.forced == whole.forced > 0


def test_slots_held_when_a_further_context_comes_are_not_taken_for_sums() -> None:
    wanted, whole = under(rules(ALL), *latte())
    model, call = latte()
    pab.enable(model, rules(ALL, budget=whole.peak_cache_bytes - 1))
    found, summary = run(model, call), pab.summary(model)  # what the first context keeps alone fits
    assert sharing(summary) and summary.forced and summary.peak_cache_bytes < whole.peak_cache_bytes
    assert difference(found[6 * len(BOTH) :], wanted[6 * len(BOTH) :]) < 1e-12  # stored again at step 3


@pytest.mark.parametrize("reuse", ["hold", "linear"])
def test_after_a_step_that_was_left_out_and_one_of_another_shape(reuse: str) -> None:
    def results(config: PABConfig) -> tuple[list[Tensor], Any]:
        model = tiny_latte.tiny_latte(torch.float64)
        pab.enable(model, config)
        with torch.no_grad(), pab.generation(model, num_steps=12):
            found = []
            for step in (0, 1, 2, 4, 5, 6, 7, 9, 11):  # 3 and 9 store
                x = tiny_latte.noise(step, height=8 if step == 7 else 16, dtype=torch.float64)
                with pab.context(model, "cond", step):
                    found.append(model(x, torch.tensor([step]), tiny_latte.prompt(1, torch.float64)).sample)
        return found, pab.summary(model)

    wanted, whole = results(rules(ALL, reuse))
    found, summary = results(rules(ALL, reuse, budget=whole.peak_cache_bytes - 1))
    assert difference(found, wanted) < 1e-12 and sharing(summary)
    assert summary.forced == whole.forced > 0 and summary.peak_cache_bytes < whole.peak_cache_bytes


@pytest.mark.parametrize(
    ("cache_dtype", "reuse", "error"),
    [("int8", "linear", 0.02), ("float8_e4m3fn", "hold", 0.05), ("int4", "hold", 0.2)],
)
def test_the_sum_is_quantised_once(cache_dtype: Any, reuse: str, error: float) -> None:
    whole, _ = under(rules(ALL, reuse), *latte())
    found, each, summary, _ = with_and_without(latte, rules(ALL, reuse, cache_dtype=cache_dtype))
    assert sharing(summary) and summary.peak_cache_bytes == given_up(summary).peak
    assert 0 < difference(found, whole) < 2 * difference(each, whole) < 2 * error * largest(whole)


def test_what_does_not_fit_in_shared_slots_keeps_the_sums_in_8_bits() -> None:
    found, wanted, summary, _ = with_and_without(latte, rules(ALL))
    exact = summary.peak_cache_bytes
    eight, summary = under(rules(ALL, budget=exact - 1), *latte())
    assert set(given_up(summary).fewer_bits) <= {span[-1] for span in given_up(summary).spans}
    assert given_up(summary).fewer_bits and summary.peak_cache_bytes == given_up(summary).peak < exact
    assert 0 < difference(eight, wanted) < 0.02 * largest(wanted)


def test_in_half_precision_a_sum_rounds_like_the_stream() -> None:
    exact, _ = under(rules(ALL), *latte())
    found, each, _, _ = with_and_without(lambda: latte(torch.bfloat16), rules(ALL))
    assert difference(found, exact) <= 2 * difference(each, exact) + 2.0**-8 * largest(exact)


@pytest.mark.parametrize(
    "config",
    [
        replace(rules(ATTENTION), cache_point="pre_gate"),
        replace(rules(ATTENTION), cache_point="unprojected"),
        rules(("spatial", "mlp")),
        PABConfig(spatial=Broadcast(2, (0, 1)), cross=Broadcast(4, (0, 1)), cache_point="post_gate"),
        PABConfig(spatial=Broadcast(2, (0, 1)), cross=Broadcast(2, (0, 1), reuse="linear"), cache_point="post_gate"),
    ],
    ids=["gates of every step", "projected at every step", "one in between", "other steps", "other weights"],
)
def test_sublayers_whose_sum_is_not_enough_have_slots_of_their_own(config: PABConfig) -> None:
    _, whole = under(config, *stdit3(), names=BOTH[:1])
    _, summary = under(replace(config, budget=whole.peak_cache_bytes - 1), *stdit3(), names=BOTH[:1])
    assert not given_up(summary).spans and given_up(summary).fewer_bits


def test_modules_that_the_model_adds_itself_have_slots_of_their_own() -> None:
    model, same = toy(), Broadcast(2, (0, 1))
    pab.enable(model, PABConfig(spatial=same, cross=same, mlp=same, budget=1000))
    with torch.no_grad(), pab.generation(model, num_steps=4):
        for step in range(4):
            model(toy_noise(step), torch.ones(1), toy_noise(1, 3))
    summary = pab.summary(model)
    assert not given_up(summary).spans and given_up(summary).fewer_bits


def test_a_hook_on_a_sublayer_ends_the_spans() -> None:
    model, call = latte()
    config = rules(ALL, reach=4, budget=150_000)
    seen: list[Tensor] = []

    def hooked(step: int, name: str) -> Tensor:
        if step == 2:
            model.transformer_blocks[0].attn2.register_forward_hook(lambda module, args, out: seen.append(out))
        return call(step, name)

    pab.enable(model, config)
    found, summary = run(model, hooked, BOTH[:1]), pab.summary(model)
    plain, same = latte()
    with torch.no_grad():
        for step in (0, 2, 4):  # what was stored at 0 is released when the hook comes
            assert difference(found[step : step + 1], [same(step, "cond")]) < 1e-12
    assert len(seen) == 2 and not given_up(summary).spans and summary.peak_cache_bytes <= 150_000


def test_a_block_that_is_changed_after_the_plan_stores_nothing_that_is_shared(caplog: pytest.LogCaptureFixture) -> None:
    found, (model, call), (plain, same) = [], latte(), latte()
    pab.enable(model, rules(ATTENTION, reach=4, budget=100_000))
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for each in (model, plain):
            each.transformer_blocks[0].only_cross_attention = True  # runs unfused
        for step in range(STEPS):
            found.append(call(step, "cond"))
            assert pab.summary(model).cache_bytes <= 100_000
        assert difference([found[0], found[4]], [same(0, "cond"), same(4, "cond")]) < 1e-12
    assert "was changed after PAB was enabled" in caplog.text


class Promoting(nn.Module):
    """Attention that gives float64."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attention(*args, **kwargs).double()


def test_a_sublayer_that_changes_the_dtype_of_the_stream_shares_nothing() -> None:
    (model, call), (plain, _) = latte(torch.float32), latte(torch.float32)
    for each in (model, plain):
        each.transformer_blocks[1].attn2 = Promoting(each.transformer_blocks[1].attn2)
        for rest in (each.transformer_blocks[1].ff, each.temporal_transformer_blocks[1], each.proj_out):
            rest.double()
    pab.enable(model, rules(ALL, budget=80_000))
    found, summary = run(model, call, BOTH[:1]), pab.summary(model)
    with torch.no_grad():
        x, text = tiny_latte.noise(1), tiny_latte.prompt(0)
        wanted = plain(x, torch.tensor([899]), text).sample
    assert difference(found[1:2], [wanted]) < 1e-5 and not given_up(summary).spans


def test_an_interrupted_call_leaves_nothing_to_add() -> None:
    model, call = latte()
    wanted, whole = under(rules(ALL), *latte())
    pab.enable(model, rules(ALL, budget=whole.peak_cache_bytes // 2))
    inside = model.transformer_blocks[1].ff.net[0]
    handle = inside.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, call)
    handle.remove()
    assert pab.summary(model).cache_bytes == 0
    run(model, call)
    assert difference(run(model, call), wanted) < 1e-12 and sharing(pab.summary(model))
