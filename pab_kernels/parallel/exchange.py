"""What ranks send one another: every byte goes through `all_to_all` and `all_gather`, and is counted there."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.dequantize import dequantize
from ..ops.quantize import quantize
from ..ops.quantized import EIGHT_BITS, GROUP, Quantized
from ..rules.traffic import Sent
from .ranks import rank_in, size_of

_collectives = torch.ops._c10d_functional
"""The functional collectives, which `torch.compile` traces."""


class Sender:
    """One place of a model that sends, such as one attention.

    Args:
        group: of the ranks that take part; None for this rank alone, which sends nothing.
        kind: of the sublayer, or "output".
        name: of the module.
    """

    def __init__(self, group: dist.ProcessGroup | None, kind: str, name: str) -> None:
        self.group, self.kind, self.name = group, kind, name
        self.size, self.rank = size_of(group), rank_in(group)
        self.sent = Sent()
        """What was sent since it was last read. A compiled graph sets it, and reads nothing of it."""
        self._group_name = "" if group is None else group.group_name

    def count(self, costs: Sent) -> None:
        """Count what one run of the module sends."""
        self.sent = costs if torch.compiler.is_compiling() else self.sent + costs

    def all_to_all(self, x: Tensor) -> tuple[Tensor, Sent]:
        """Send part i of `[n, ...]`, contiguous, to rank i; part i of the result is from rank i."""
        parts = [x[0].numel()] * self.size
        out = _collectives.all_to_all_single(x.flatten(), parts, parts, self._group_name)
        return _collectives.wait_tensor(out).view(x.shape), Sent(_nbytes(x) // self.size * (self.size - 1), 1)

    def all_gather(self, x: Tensor) -> tuple[Tensor, Sent]:
        """The tensors of all ranks, `[n, ...]`, from each rank's own, which is contiguous."""
        out = _collectives.all_gather_into_tensor(x.flatten(), self.size, self._group_name)
        return _collectives.wait_tensor(out).view(self.size, *x.shape), Sent(_nbytes(x) * (self.size - 1), 1)


def _nbytes(x: Tensor) -> int:
    """Also where sizes are symbols of a compiled graph."""
    return x.numel() * x.element_size()


def switched(
    sender: Sender, x: Tensor, split: int, gather: int, fewer: torch.dtype | None = None
) -> tuple[Tensor, Sent]:
    """A tensor of which each rank has a part along `gather` as one of which it has a part along `split`.

    Args:
        sender: of the group.
        x: `[...]`, with all of `split`, which is padded with zeros to a multiple of the ranks.
        split, gather: dimensions, none of them the last.
        fewer: the dtype in which it is sent, in 8 bits with a bfloat16 scale for each 128 channels; default its own.

    Returns:
        The tensor, with `split` over n and n times `gather`, and what was sent.
    """
    out, cost = exchanged(sender, _parts(x, split, sender.size), fewer)
    return _joined(out, split, gather), cost


def exchanged(sender: Sender, parts: Tensor, fewer: torch.dtype | None = None) -> tuple[Tensor, Sent]:
    """Send part i of `[n, ...]` to rank i; part i of the result is from rank i. `fewer` as in `switched`."""
    if fewer not in EIGHT_BITS:
        out, cost = sender.all_to_all(parts.to(fewer or parts.dtype).contiguous())
        return out.to(parts.dtype), cost
    received, cost = _in_one_message(sender, quantize(parts, fewer, GROUP), torch.bfloat16)
    return dequantize(received, parts.dtype), cost


def switched_quantised(
    sender: Sender, x: Tensor, split: int, gather: int, dtype: torch.dtype
) -> tuple[Quantized, Sent]:
    """As `switched`, quantised before it is sent, and as it is kept in a slot: with float32 scales."""
    received, cost = _in_one_message(sender, quantize(_parts(x, split, sender.size), dtype, GROUP), torch.float32)
    data, scale = (_joined(t, split, gather) for t in (received.data, received.scale))
    return Quantized(data, scale, GROUP), cost


def gathered(sender: Sender, x: Tensor, dim: int) -> tuple[Tensor, Sent]:
    """The tensors of all ranks, one after another along `dim`."""
    out, cost = sender.all_gather(x.contiguous())
    return torch.cat(out.unbind(0), dim), cost


def _parts(x: Tensor, split: int, n: int) -> Tensor:
    """`[n, ...]`: the parts of x along a dimension, padded with zeros."""
    behind = -x.shape[split] % n
    if behind:
        x = torch.cat([x, x.new_zeros(*x.shape[:split], behind, *x.shape[split + 1 :])], split)
    return x.unflatten(split, (n, -1)).movedim(split, 0)


def _joined(parts: Tensor, split: int, gather: int) -> Tensor:
    """The parts `[n, ...]`, from each rank one, one after another along a dimension."""
    return parts.movedim(0, gather).flatten(gather, gather + 1)


def _in_one_message(sender: Sender, x: Quantized, scales: torch.dtype) -> tuple[Quantized, Sent]:
    """An 8-bit tensor, with its scales behind it in one message."""
    n, data, scale = sender.size, x.data, x.scale
    behind = scale.to(scales).contiguous()
    message = torch.cat([data.contiguous().view(torch.uint8).view(n, -1), behind.view(torch.uint8).view(n, -1)], 1)
    received, cost = sender.all_to_all(message)
    values = data[0].numel()
    data = received[:, :values].contiguous().view(data.dtype).view(data.shape)
    scale = received[:, values:].contiguous().view(scales).view(scale.shape).float()
    return Quantized(data, scale, x.group), cost
