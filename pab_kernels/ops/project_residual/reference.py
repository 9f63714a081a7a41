"""The definition of `project_residual` in pure torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..cached_outputs import add_cached_outputs, add_in_float32
from ..dispatch import Outputs
from ..quantize.reference import quantize
from ..quantized import FORMATS, Quantized

if TYPE_CHECKING:
    from . import ProjectResidual


def compute(call: ProjectResidual) -> Outputs:
    a, weight, bias, x, gate, *_, cached = call
    p = F.linear(a, weight, bias)
    gated = p if gate is None else gate * p
    return add_cached_outputs(gated + x, cached).contiguous(), _stored(call, p, gated)


def rounded_once(call: ProjectResidual) -> Outputs:
    """The outputs as kernels round them: in float32; p, the slot and the new x round once each."""
    a, weight, bias, x, gate, *_, cached = call
    p = F.linear(a.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    gated = p.float() if gate is None else gate.float() * p.float()
    return add_in_float32(gated + x.float(), cached).to(x.dtype), _stored(call, p, gated.to(x.dtype))


def _stored(call: ProjectResidual, p: Tensor, gated: Tensor) -> Tensor | Quantized | None:
    """The slot, in x's dtype or quantised."""
    if call.store is None:
        return None
    stored = p if call.store == "pre_gate" else gated
    dtype = call.quantised
    return stored.contiguous() if dtype is None else quantize(stored, dtype, FORMATS[dtype].group)
