"""Turns inside a compiled graph: decided before the model runs, accounted for after it.

A graph may depend on what its sublayers do (compute, store, reuse) and on nothing else that changes from step to step. So a compiled block
reads its turns from plain attributes, takes what it reuses in as tensors, and leaves in an attribute what is to be kept.
"""

from __future__ import annotations

from typing import Any

import torch

from .plan import Action, Sublayer
from .slots import Line, Slot


class TracedTurn:
    """One sublayer's turn as a compiled graph finds it, and what the graph did with it.

    Args:
        sublayer: whose turn it is.
        action: what it is to do: `Action.REUSE`, `STORE` or `COMPUTE`, by name.
        slot: what it reuses.
    """

    def __init__(self, sublayer: Sublayer, action: Action, slot: Slot | Line | None) -> None:
        self.sublayer = sublayer
        self.action = action.name
        self.slot = slot
        self.runs = 0
        self.reused = False
        self.input: tuple[tuple[int, ...], torch.dtype, torch.device] | None = None
        self.kept: Any = None
        self.dtype: torch.dtype | None = None

    def take(self, x: torch.Tensor) -> str:
        """The action on input `x`: for the first time in a call the one decided, unless what would be reused belongs to another input."""
        self.runs += 1
        if self.runs > 1:
            return "COMPUTE"
        self.input = (tuple(x.shape), x.dtype, x.device)
        if self.slot is None:
            return self.action
        self.reused = self.slot.key.matches(x)
        return "REUSE" if self.reused else "STORE"

    def keep(self, value: Any, dtype: torch.dtype | None) -> None:
        """Leave an output to be kept."""
        self.kept, self.dtype = value, dtype
