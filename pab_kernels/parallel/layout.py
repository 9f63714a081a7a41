"""How a model's call is split over ranks: its arguments before it runs, and its output after it has run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..broadcast.attach import Attached
from ..broadcast.call import Call
from .exchange import Sender, gathered
from .ranks import rank_in, size_of

POSITIONS = ("image_rotary_emb", "img_ids", "txt_ids")
"""Arguments whose tensors of two dimensions begin with the tokens, not with the batch."""


class Layout(Protocol):
    """One way to split the sequence of a model over ranks."""

    @property
    def senders(self) -> Sequence[Sender]:
        """The places that send."""

    def attach(self) -> Iterable[Attached]:
        """Stand-ins beneath those of PAB, not yet attached."""

    def begin(self, call: Call | None) -> None:
        """Get ready for a call of the model, outside of compiled graphs.

        Args:
            call: under PAB, or None without it.
        """

    def part_of(self, shape: Sequence[int], latents: Sequence[int]) -> tuple[int, ...]:
        """The shape of a rank's part of a sublayer's output, or of a larger one.

        Args:
            shape: `[..., C]`, of all ranks.
            latents: shape of the latents of the call.
        """

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The output of the model, whole on every rank.

        Args:
            forward: takes this rank's part of the arguments.
            arguments: of all ranks, by their names.
        """


class Guidance:
    """CFG parallelism: each of two ranks runs one half of the batch, and the output is exchanged.

    Args:
        group: of the two ranks.
        latents: name of the argument whose first dimension is the batch.
    """

    def __init__(self, group: Any, latents: str) -> None:
        self._latents = latents
        self._output = Sender(group, "output", "guidance")
        self.senders = [self._output]

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """See `Layout.run`.

        Raises:
            ValueError: the batch is odd.
        """
        n, batch = self._output.size, arguments[self._latents].shape[0]
        if batch % n:
            raise ValueError(
                f"got a batch of {batch} with cfg={n}; supported are batches that hold both branches of guidance. If "
                "the model is called for one branch at a time, use pab.parallelize(..., cfg=1)"
            )
        first, rows = self._output.rank * (batch // n), batch // n

        def half(value: Any, least: int) -> Any:
            whole = isinstance(value, Tensor) and value.ndim >= least and value.shape[0] == batch
            return value.narrow(0, first, rows) if whole else value

        halves = {
            name: pytree.tree_map(partial(half, least=3 if name in POSITIONS else 1), value)
            for name, value in arguments.items()
        }
        out = forward(halves)
        return whole_output(self._output, out, 0)


def part(x: Tensor, dim: int, group: Any, least: int = 1) -> Tensor:
    """This rank's part of x along a dimension; behind its end stands the last element again.

    Args:
        x: the same on all ranks.
        dim: that is split.
        group: of the ranks.
        least: elements of a part.
    """
    rank, size, whole = rank_in(group), size_of(group), x.shape[dim]
    length = max(-(-whole // size), least)
    at = torch.arange(rank * length, (rank + 1) * length, device=x.device).clamp(max=whole - 1)
    return x.index_select(dim, at)


def whole_output(sender: Sender, out: Any, dim: int, length: int | None = None) -> Any:
    """A model's output with the parts of all ranks along a dimension.

    Args:
        sender: of the ranks.
        out: a tensor, or a pytree of tensors.
        dim: along which they are parts.
        length: of the whole, without what was added to split it evenly.
    """
    if sender.group is None:
        return out

    def whole(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found, cost = gathered(sender, value, dim)
        sender.count(cost)
        return found if length is None else found.narrow(dim, 0, length)

    return pytree.tree_map(whole, out)
