"""The oracle for whole pipelines: modules that write down what they give and, where the rule asks for reuse, say it
again.

It knows nothing of plans, slots and generations: a step is a call of the scheduler's `step`, and a branch of guidance
is known by the name that the pipeline gives it, or by its place among the calls of the model in one step.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.attach import is_stand_in
from pab_kernels.broadcast.summary import Summary
from pab_kernels.rules.plan import Sublayer
from tests.adapters.tiny_pipes import Pipe
from tests.oracle import Rule


class Replay:
    """A plain pipeline under rules.

    Args:
        pipe: not enabled.
        sublayers: of its transformer.
        rules: by kind.
        first: the step at which the model is called first.
        entered: the step at which the schedule is entered; default `first`.
        model: of the pipeline; default its `transformer`.
    """

    def __init__(
        self,
        pipe: Any,
        sublayers: Sequence[Sublayer],
        rules: Mapping[str, Rule],
        first: int = 0,
        entered: int | None = None,
        model: Any = None,
    ) -> None:
        self.pipe, self.sublayers, self.rules, self.first = pipe, sublayers, rules, first
        self.entered = first if entered is None else entered
        self.model = pipe.transformer if model is None else model
        self.runs: Counter[str] = Counter()  # of each module that has a rule
        self.computed: Counter[tuple[str, str]] = Counter()  # by branch and kind, since the schedule began last
        self.reused: Counter[tuple[str, str]] = Counter()
        self._begin()

    def _begin(self) -> None:
        self.step, self.order, self.name = self.entered, 0, ""
        self.times: Counter[str] = Counter()  # that a module ran in this call of the model
        self.written: dict[tuple[str, str, int], tuple[int, torch.Size, Any]] = {}  # step, shape of the input, output
        self.computed.clear()
        self.reused.clear()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The pipeline runs under the rules."""
        model, scheduler, modules = self.model, self.pipe.scheduler, dict(self.model.named_modules())
        begin, step, forward = scheduler.set_timesteps, scheduler.step, model.forward

        @functools.wraps(begin)  # pipelines ask for the inputs of both
        def begun(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            return begin(*args, **kwargs)

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.step, self.order = self.step + 1, 0
            return step(*args, **kwargs)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.times.clear()
            out = forward(*args, **kwargs)
            self.order += 1
            return out

        @contextlib.contextmanager
        def named(name: str, **_: Any) -> Iterator[None]:
            self.name = name
            yield
            self.name = ""

        with contextlib.ExitStack() as stack:
            for owner, method, stand_in in (
                (scheduler, "set_timesteps", begun),
                (scheduler, "step", stepped),
                (model, "forward", called),
                (model, "cache_context", named),
            ):
                stack.enter_context(mock.patch.object(owner, method, stand_in, create=method == "cache_context"))
            for s in self.sublayers:
                if s.kind in self.rules:
                    stack.enter_context(
                        mock.patch.object(modules[s.name], "forward", self._stand_in(modules[s.name], s))
                    )
            yield

    def _stand_in(self, module: nn.Module, sublayer: Sublayer) -> Callable[..., Any]:
        original, rule = module.forward, self.rules[sublayer.kind]

        def forward(*args: Any, **kwargs: Any) -> Any:
            timesteps = self.pipe.scheduler.timesteps
            shape = next(v.shape for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))
            branch = self.name or f"#{self.order}"
            place = (branch, sublayer.name, self.times[sublayer.name])
            self.times.update([sublayer.name])
            at, wrote, out = self.written.get(place, (-1, None, None))
            source = max(
                (i for i in range(self.first, self.step) if not rule.reuses(i, self.first, timesteps)),
                default=self.step,
            )
            if rule.reuses(self.step, self.first, timesteps) and at >= source and wrote == shape:
                self.reused[branch, sublayer.kind] += 1
                return out
            self.runs[sublayer.name] += 1
            self.computed[branch, sublayer.kind] += 1
            self.written[place] = (self.step, shape, original(*args, **kwargs))
            return self.written[place][2]

        return forward


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
    replay = Replay(
        twin, [s for s in pab.sublayers(pipe) if s.kind != "block"], RULES, first, model=getattr(twin, tiny.denoiser)
    )
    with replay.running():
        expected = tiny.sample(twin, steps, **call)
    assert not torch.equal(expected, plain)
    for _ in range(2):
        with counted_runs(model, replay.sublayers) as runs:
            assert torch.equal(tiny.sample(pipe, steps, **call), expected)
        summary = pab.summary(pipe)
        assert summary.plan is not None and summary.plan.schedule.begin == first
        assert summary.cache_bytes == 0 and summary.peak_cache_bytes > 0
        counts = {
            (name, kind): (t.computed, t.reused)
            for name, kinds in summary.contexts.items()
            for kind, t in kinds.items()
        }
        assert counts == {place: (replay.computed[place], replay.reused[place]) for place in counts}
        assert counts.keys() == replay.computed.keys()
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
