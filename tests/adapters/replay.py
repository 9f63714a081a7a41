"""The oracle for whole pipelines: modules that write down what they give and, where the rule asks for reuse, say it again.

It knows nothing of plans, slots, generations and contexts: a step is a call of the scheduler's `step`, and a branch of guidance is known by
its place among the calls of the model in one step.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from torch import nn

from pab_kernels.broadcast.plan import Sublayer
from tests.oracle import Rule


class Replay:
    """A plain pipeline under rules.

    Args:
        pipe: not enabled.
        sublayers: of its transformer.
        rules: by kind.
        first: the step at which the schedule is entered.
    """

    def __init__(self, pipe: Any, sublayers: Sequence[Sublayer], rules: Mapping[str, Rule], first: int = 0) -> None:
        self.pipe, self.sublayers, self.rules, self.first = pipe, sublayers, rules, first
        self.step = self.branch = 0
        self.times: Counter[str] = Counter()  # that a module ran in this call of the model
        self.written: dict[tuple[int, str, int], tuple[int, Any]] = {}
        self.computed: Counter[tuple[int, str]] = Counter()  # by branch and kind
        self.reused: Counter[tuple[int, str]] = Counter()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The pipeline's next run is under the rules."""
        model, scheduler = self.pipe.transformer, self.pipe.scheduler
        modules = dict(model.named_modules())
        step, forward = scheduler.step, model.forward

        @functools.wraps(step)  # pipelines ask for the inputs of `step`
        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.step, self.branch = self.step + 1, 0
            return step(*args, **kwargs)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.times.clear()
            out = forward(*args, **kwargs)
            self.branch += 1
            return out

        self.step = self.first
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(scheduler, "step", stepped))
            stack.enter_context(mock.patch.object(model, "forward", called))
            for s in self.sublayers:
                if s.kind in self.rules:
                    stack.enter_context(mock.patch.object(modules[s.name], "forward", self._stand_in(modules[s.name], s)))
            yield

    def _stand_in(self, module: nn.Module, sublayer: Sublayer) -> Callable[..., Any]:
        original, rule = module.forward, self.rules[sublayer.kind]

        def forward(*args: Any, **kwargs: Any) -> Any:
            timesteps = self.pipe.scheduler.timesteps
            place = (self.branch, sublayer.name, self.times[sublayer.name])
            self.times.update([sublayer.name])
            at, out = self.written.get(place, (-1, None))
            source = max((i for i in range(self.first, self.step) if not rule.reuses(i, self.first, timesteps)), default=self.step)
            if rule.reuses(self.step, self.first, timesteps) and at >= source:
                self.reused[self.branch, sublayer.kind] += 1
                return out
            self.computed[self.branch, sublayer.kind] += 1
            self.written[place] = (self.step, original(*args, **kwargs))
            return self.written[place][1]

        return forward


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
