"""Differences between the outputs of neighbouring steps, measured while a model samples without broadcasting.

For sublayer s in context c, with its outputs o_i at step i,

    1. mse_i      = mean((o_i - o_(i-1))^2)
    2. relative_i = ||o_i - o_(i-1)|| / ||o_i||

the error of holding the last output for one step. For a block, o is the change that it makes to its stream. Only the
last output is kept, and nothing is read from the device before the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ...broadcast.adapter import Adapter
from ...broadcast.call import Call
from ...progress import Progress
from ...rules.plan import Sublayer
from ..observer import Observer

_Place = tuple[str, str, int]
"""Context, sublayer, step."""


@dataclass(frozen=True)
class Differences:
    """Differences of one sublayer in one context.

    Entry i compares step i with the step before it; None if either did not run.

    Args:
        name, kind, layer: of the sublayer.
        context: in which it ran.
        mse: mean squared differences.
        relative: relative differences.
    """

    name: str
    kind: str
    layer: int
    context: str
    mse: tuple[float | None, ...]
    relative: tuple[float | None, ...]


class Probe(Observer):
    """Measures outputs instead of broadcasting them.

    Args:
        model: the DiT.
        adapter: of the model; its sublayers are measured.
        progress: called at the beginning of every step.
        check: called before every sublayer; an exception that it raises ends the run.

    An exception between any two instructions keeps the differences measured before: a difference and its place are one
    entry of a list, and an entry that occurs twice counts once.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        progress: Progress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(model, adapter.sublayers, check)
        self._progress = progress
        self._last: dict[tuple[str, str], tuple[int, list[torch.Tensor]]] = {}
        self._found: list[tuple[_Place, torch.Tensor]] = []  # [2] each, not yet in a batch
        self._batches: list[tuple[list[_Place], torch.Tensor]] = []  # [places, 2]
        self._step = -1
        self.num_steps = 0
        self.timesteps: tuple[float, ...] | None = None

    def differences(self) -> list[Differences]:
        """All differences so far; only this method reads from the device."""
        self._batch()
        rows: dict[tuple[str, str], dict[int, list[float]]] = {}
        for places, batch in self._batches:
            for (context, name, step), pair in zip(places, batch.tolist(), strict=True):
                rows.setdefault((context, name), {})[step] = pair
        by_name = {s.name: s for s in self.sublayers}

        def column(row: dict[int, list[float]], which: int) -> tuple[float | None, ...]:
            return tuple(row[i][which] if i in row else None for i in range(self.num_steps))

        return [
            Differences(name, by_name[name].kind, by_name[name].layer, context, column(row, 0), column(row, 1))
            for (context, name), row in rows.items()
        ]

    def observe(self, call: Call, sublayer: Sublayer, outputs: list[torch.Tensor]) -> None:
        """Compare an output with that of the step before."""
        if call.step != self._step:
            self._step = call.step
            self._batch()
            schedule = call.generation.schedule
            self.timesteps, self.num_steps = schedule.timesteps, schedule.num_steps
            if self._progress:
                self._progress(call.step - schedule.begin + 1, schedule.num_steps - schedule.begin)
        key = (call.context.name, sublayer.name)
        step, last = self._last.get(key, (None, []))
        if step == call.step or not outputs:
            return  # a module that runs several times in one call is measured the first time
        if step == call.step - 1 and [t.shape for t in last] == [t.shape for t in outputs]:
            self._found.append(((*key, call.step), _compared(outputs, last)))
        del last
        self._last[key] = call.step, [t.clone() for t in outputs]  # the caller may write to the output

    def _batch(self) -> None:
        """Stack the values of a step into one tensor."""
        if self._found:
            self._batches.append(([place for place, _ in self._found], torch.stack([pair for _, pair in self._found])))
            self._found = []


def _compared(tensors: list[torch.Tensor], last: list[torch.Tensor]) -> torch.Tensor:
    """`[mse, relative]` over all of an output's tensors, in float32 on their device."""
    squared = sum((a.float() - b.float()).square().sum() for a, b in zip(tensors, last, strict=True))
    size = sum(a.float().square().sum() for a in tensors)
    assert isinstance(squared, torch.Tensor) and isinstance(size, torch.Tensor)
    numel = sum(a.numel() for a in tensors)
    return torch.stack([squared / numel, (squared / size.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()])
