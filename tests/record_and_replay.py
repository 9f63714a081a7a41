"""The oracle for whole models and pipelines: plain modules that record their outputs and, where their rule asks for
reuse, replay them.

It knows nothing of plans, slots and generations. A step and a context are what the caller names; under a pipeline, a
step is a call of the scheduler's `step`, and a branch of guidance is known by the name that the pipeline gives it, or
by its place among the calls of the model in one step.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pab_kernels.rules.plan import Sublayer
from tests.oracle import Rule


@dataclass(frozen=True)
class Record:
    """One call of a module: the step, the tensors that it was given, and its output."""

    step: int
    inputs: list[Tensor]
    output: Any


class RecordAndReplay:
    """A plain model under rules.

    Args:
        model: not enabled.
        sublayers: of it. A block replays the change of its streams, any other sublayer its output.
        rules: by kind.
        timesteps: of the full schedule, read in each call; their number alone where no window is of timesteps.
        first: the step at which the model is called first.

    Attributes:
        counts: calls of modules that have a rule, by context, kind and "computed", "reused" or "forced" (computed where
            the rule asks for reuse, as nothing fits that the last computing step recorded), since `begin`.
        runs: how often each of these modules really ran.
    """

    def __init__(
        self,
        model: Any,
        sublayers: Sequence[Sublayer],
        rules: Mapping[str, Rule],
        timesteps: Callable[[], Sequence[float]],
        first: int = 0,
    ) -> None:
        self.model, self.rules, self.timesteps, self.first = model, rules, timesteps, first
        self.sublayers = [s for s in sublayers if s.kind in rules]
        self.runs: Counter[str] = Counter()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.begin()

    def begin(self) -> None:
        """A generation begins: nothing is recorded."""
        self._records: dict[tuple[str, str, int], Record] = {}  # by context, sublayer, and its how manieth call
        self.counts.clear()
        self.at(0, "")

    def at(self, step: int, context: str) -> None:
        """The model is called next at this step in this context."""
        self.step, self.context = step, context
        self._times: Counter[str] = Counter()  # that a module ran in this call of the model

    def install(self) -> None:
        """The model runs under the rules for good."""
        for s in self.sublayers:
            module = self.model.get_submodule(s.name)
            module.forward = self._stand_in(module, s)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model runs under the rules inside."""
        with contextlib.ExitStack() as stack:
            for s in self.sublayers:
                module = self.model.get_submodule(s.name)
                stack.enter_context(mock.patch.object(module, "forward", self._stand_in(module, s)))
            yield

    def _stand_in(self, module: nn.Module, sublayer: Sublayer) -> Callable[..., Any]:
        original, rule = module.forward, self.rules[sublayer.kind]

        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
            place = (self.context, sublayer.name, self._times[sublayer.name])
            self._times.update([sublayer.name])
            reuses = self._reuses(rule, sublayer, self.step)
            record = self._records.get(place) if reuses else None
            if record is not None and record.step >= self._source(rule, sublayer) and fits(record, inputs):
                self.counts[self.context, sublayer.kind, "reused"] += 1
                return moved(record, inputs) if sublayer.kind == "block" else copied(record.output)
            self.runs[sublayer.name] += 1
            self.counts[self.context, sublayer.kind, "computed"] += 1
            self.counts[self.context, sublayer.kind, "forced"] += reuses
            before = copied(inputs)  # a module may write into what it is given
            out = original(*args, **kwargs)
            self._records[place] = Record(self.step, before, copied(out))
            return out

        return forward

    def _reuses(self, rule: Rule, sublayer: Sublayer, step: int) -> bool:
        applies = rule.layers is None or sublayer.layer in rule.layers
        return applies and rule.reuses(step, self.first, self.timesteps())

    def _source(self, rule: Rule, sublayer: Sublayer) -> int:
        """The last step before this one that computes: what is older is not replayed."""
        computing = (i for i in range(self.first, self.step) if not self._reuses(rule, sublayer, i))
        return max(computing, default=self.step)


def fits(record: Record, inputs: list[Tensor]) -> bool:
    """Whether the stream, which is the first tensor, has the shape that it had."""
    return record.inputs[0].shape == inputs[0].shape


def copied(nest: Any) -> Any:
    """With tensors of its own, which nobody writes into."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, nest)


def moved(record: Record, inputs: list[Tensor]) -> Any:
    """What a block adds to each of its streams, added to these; a stream is known by its shape, among several of one
    shape it is the first."""
    streams = {tuple(x.shape): (b, x) for b, x in zip(reversed(record.inputs), reversed(inputs), strict=True)}

    def add(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        before, now = streams[tuple(out.shape)]
        return now + (out - before)

    return pytree.tree_map(add, record.output)


@contextlib.contextmanager
def replaying(pipe: Any, replay: RecordAndReplay, entered: int | None = None) -> Iterator[None]:
    """A plain pipeline's model runs under its rules at each step of the pipeline's scheduler.

    Args:
        pipe: not enabled.
        replay: of its model.
        entered: the step at which the schedule is entered; default the one at which the model is called first.
    """
    model, scheduler = replay.model, pipe.scheduler
    begin, step, forward = scheduler.set_timesteps, scheduler.step, model.forward
    start = replay.first if entered is None else entered
    at, order, context = start, 0, ""  # the step, the number of calls in it, and the name of this one

    @functools.wraps(begin)  # pipelines ask for the inputs of both
    def begun(*args: Any, **kwargs: Any) -> Any:
        nonlocal at, order, context
        at, order, context = start, 0, ""
        replay.begin()
        return begin(*args, **kwargs)

    @functools.wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        nonlocal at, order
        at, order = at + 1, 0
        return step(*args, **kwargs)

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal order
        replay.at(at, context or f"#{order}")
        out = forward(*args, **kwargs)
        order += 1
        return out

    @contextlib.contextmanager
    def named(name: str, **_: Any) -> Iterator[None]:
        nonlocal context
        context = name
        yield
        context = ""

    with contextlib.ExitStack() as stack:
        for owner, method, stand_in in (
            (scheduler, "set_timesteps", begun),
            (scheduler, "step", stepped),
            (model, "forward", called),
            (model, "cache_context", named),
        ):
            stack.enter_context(mock.patch.object(owner, method, stand_in, create=method == "cache_context"))
        stack.enter_context(replay.running())
        yield


def replay_of_pipeline(
    pipe: Any, sublayers: Sequence[Sublayer], rules: Mapping[str, Rule], first: int = 0, model: Any = None
) -> RecordAndReplay:
    """Of a plain pipeline's model, default its `transformer`, over the schedule of its scheduler."""
    return RecordAndReplay(
        pipe.transformer if model is None else model, sublayers, rules, lambda: pipe.scheduler.timesteps, first
    )
