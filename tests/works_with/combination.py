"""PAB together with something else, compared with that something else alone.

The oracle is the other thing with an `if` around each sublayer: record and replay of what a sublayer's `forward` gives,
inside of everything that others have put around it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.rules.config import MODULE_KINDS
from tests.adapters.tiny_latte import noise, prompt, tiny_latte
from tests.adapters.tiny_models import FAMILIES
from tests.oracle import Rule
from tests.record_and_replay import RecordAndReplay

STEPS = 6
CONTEXTS = ("cond", "uncond")
ONE = PABConfig(*(Broadcast(1),) * 4)
TWO = PABConfig(*(Broadcast(2, (0, 1)),) * 4)
"""Every sublayer computes at even steps and reuses at odd ones."""


@dataclass(frozen=True)
class Subject:
    """A tiny model.

    Args:
        name: of its class.
        build: makes it, with the same weights each time.
        inputs: of a call, by the seed.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]

    def call(self, model: Any, seed: int) -> Tensor:
        return model(**self.inputs(seed))[0]


def _latte_inputs(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": prompt(seed),
        "return_dict": False,
    }


_GENERIC = {t.name: Subject(t.name, t.build, t) for t in FAMILIES}
WAN, FLUX, COGVIDEOX = (
    _GENERIC[f"{name}"] for name in ("WanTransformer3DModel", "FluxTransformer2DModel", "CogVideoXTransformer3DModel")
)
LATTE = Subject("LatteTransformer3DModel", tiny_latte, _latte_inputs)
"""The one that is not run by the generic adapter."""
SUBJECTS = (WAN, FLUX, COGVIDEOX, LATTE)


def sublayers(model: Any) -> dict[str, str]:
    """Kind of each sublayer but whole blocks, by name."""
    return {s.name: s.kind for s in pab.sublayers(model) if s.kind != "block"}


def replay_in(model: Any) -> RecordAndReplay:
    """Record and replay under the rules of `TWO` in a plain model, inside of what is put around its modules later."""
    replay = RecordAndReplay(
        model, pab.sublayers(model), dict.fromkeys(MODULE_KINDS[:-1], Rule(2, (0, 1))), lambda: range(STEPS)
    )
    replay.install()
    return replay


def run(subject: Subject, model: Any, replay: RecordAndReplay | None = None) -> list[Tensor]:
    """What the model gives in one generation: at every step in every context, from inputs that are new each time."""
    outputs = []
    for step in range(STEPS):
        for place, name in enumerate(CONTEXTS):
            if replay is not None:
                replay.at(step, name)
            place_in_time = {"step_index": step, "num_inference_steps": STEPS, "sigma": 1 - step / STEPS}
            with getattr(model, "_orig_mod", model).cache_context(name, **place_in_time):
                outputs.append(subject.call(model, step + 100 * place).clone())
    if hasattr(model, "_reset_stateful_cache"):
        model._reset_stateful_cache()
    return outputs


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def counted(model: Any) -> Counter[tuple[str, str, str]]:
    """What `summary` counts, as `RecordAndReplay.counts` has it.

    Without its FLOPs, which take longer than the tiny models do.
    """
    broadcaster = broadcaster_of(getattr(model, "_orig_mod", model))
    assert broadcaster is not None and broadcaster.latest is not None
    return Counter(
        {
            (context.name, kind, what): getattr(tally, what)
            for context in broadcaster.latest.contexts.values()
            for kind, tally in context.tallies().items()
            for what in ("computed", "reused", "forced")
        }
    )


Combine = Callable[[Any], Any]
"""Changes a model, or returns another that holds it."""


def enabled_before_and_after(subject: Subject, combine: Combine) -> Iterator[tuple[str, Any]]:
    """The combination with PAB, switched on first or last."""
    for order in ("before", "after"):
        model = subject.build()
        if order == "before":
            pab.enable(model, ONE, num_steps=STEPS)
        model = combine(model) or model
        if order == "after":
            pab.enable(model, ONE, num_steps=STEPS)
        yield order, model


def check(
    subject: Subject,
    combine: Combine,
    *,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    forced: bool = False,
    flops: bool = True,
) -> None:
    """PAB is right together with what `combine` does to a model and `around` to its calls.

    Range 1 is bit-identical to the combination without PAB, range 2 to the oracle, also in a second generation; the
    counts are its; `disable` gives the combination back, with no trace.

    Args:
        forced: whether the combination skips what a later step was to read.
        flops: whether the combination runs on the meta device, where FLOPs are counted.
    """
    plain = subject.build()
    plain = combine(plain) or plain
    with around():
        wanted = run(subject, plain)
    twin = subject.build()
    replay = replay_in(twin)
    twin = combine(twin) or twin
    with around():
        again = run(subject, twin, replay)
    assert all(out.isfinite().all() for out in again) and not same(again, wanted)
    assert forced == any(number for (*_, what), number in replay.counts.items() if what == "forced")
    traces = {name: sorted(vars(m)) for name, m in plain.named_modules()}
    for order, model in enabled_before_and_after(subject, combine):
        with around():
            assert same(run(subject, model), wanted), f"range 1, enabled {order}"
            pab.enable(model, TWO)
            for _ in range(2 if order == "after" else 1):
                with pab.generation(model, num_steps=STEPS):
                    assert same(run(subject, model), again), f"range 2, enabled {order}"
                assert counted(model) == replay.counts
            if order == "after":
                summary = pab.summary(model)
                assert summary.cache_bytes == 0 and (0 < summary.flops < summary.flops_without) == flops
            pab.disable(model)
            assert same(run(subject, model), wanted), f"disabled, enabled {order}"
        assert {name: sorted(vars(m)) for name, m in model.named_modules()} == traces
