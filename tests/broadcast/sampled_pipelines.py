"""Whole pipelines under PAB, compared with record and replay in a plain one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.attach import is_stand_in
from pab_kernels.broadcast.summary import Summary
from pab_kernels.rules.plan import Sublayer
from tests.adapters.tiny_pipes import Pipe
from tests.oracle import Rule
from tests.record_and_replay import replay_of_pipeline, replaying

RULES = {"spatial": Rule(2, (0, 1)), "temporal": Rule(2, (0, 1)), "cross": Rule(4, (0, 1)), "mlp": Rule(3, (0.3, 0.9))}
CONFIG = PABConfig(**{kind: Broadcast(rule.range, rule.window) for kind, rule in RULES.items()})


def assert_runs_as_the_oracle(tiny: Pipe, steps: int, first: int = 0, **call: Any) -> Summary:
    """Range 1 is the plain pipeline, `RULES` are the oracle, in two runs.

    And without PAB it is plain again. The summary under `RULES`.
    """
    pipe, twin = tiny.build(), tiny.build()
    plain = tiny.sample(pipe, steps, **call)
    assert plain.isfinite().all()
    pab.enable(pipe, PABConfig(1, 1, 1, 1, 1))
    assert torch.equal(tiny.sample(pipe, steps, **call), plain)
    pab.enable(pipe, CONFIG)
    model = getattr(pipe, tiny.denoiser)
    replay = replay_of_pipeline(twin, pab.sublayers(pipe), RULES, first, getattr(twin, tiny.denoiser))
    with replaying(twin, replay):
        expected = tiny.sample(twin, steps, **call)
    assert not torch.equal(expected, plain)
    for _ in range(2):
        with counted_runs(model, replay.sublayers) as runs:
            assert torch.equal(tiny.sample(pipe, steps, **call), expected)
        summary = pab.summary(pipe)
        assert summary.plan is not None and summary.plan.schedule.begin == first
        assert summary.cache_bytes == 0 and summary.peak_cache_bytes > 0
        counts = {
            (name, kind, what): getattr(tally, what)
            for name, kinds in summary.contexts.items()
            for kind, tally in kinds.items()
            for what in ("computed", "reused", "forced")
        }
        assert Counter(counts) == replay.counts
        assert runs == replay.runs
    pab.disable(pipe)
    assert torch.equal(tiny.sample(pipe, steps, **call), plain)
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()
    assert not any(is_stand_in(v) for m in model.modules() for v in vars(m).values())
    return summary


@contextlib.contextmanager
def counted_runs(model: nn.Module, sublayers: Sequence[Sublayer]) -> Iterator[Counter[str]]:
    """How often each sublayer really ran: the calls of the first linear layer in it, by forward hooks."""
    runs: Counter[str] = Counter()
    handles = []
    for s in sublayers:
        linear = next(m for m in model.get_submodule(s.name).modules() if isinstance(m, nn.Linear))
        handles.append(linear.register_forward_pre_hook(lambda *_, name=s.name: runs.update([name])))
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()
