"""The norms that the operations apply inside: LayerNorm and RMSNorm over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import LARGEST, check_number, check_operand, none_of


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the channels of a token.

    Args:
        kind: "layer" (mean and variance) or "rms" (root mean square).
        weight: `[C]` in x's dtype, or None.
        bias: `[C]` in x's dtype, or None; only for "layer".
        eps: added to the variance or mean square; finite, 0 or more.
    """

    kind: Literal["layer", "rms"] = "layer"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6


NORM_SCHEMA = "str? {0}, Tensor? {0}_weight, Tensor? {0}_bias, float {0}_eps"


def check_norm(op: str, name: str, norm: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """A norm whose weight and bias have this shape."""
    if norm.kind not in ("layer", "rms"):
        raise ValueError(none_of(op, f"{name}.kind", norm.kind, ("layer", "rms")))
    if norm.kind == "rms" and norm.bias is not None:
        raise ValueError(f"{op}: {name}.bias is given with kind 'rms'; only 'layer' is supported with one: pass None")
    if type(norm.eps) is not float or not 0.0 <= norm.eps <= LARGEST:
        check_number(op, f"{name}.eps", norm.eps, 0.0)
    for part, t in (("weight", norm.weight), ("bias", norm.bias)):
        if t is not None:
            check_operand(op, f"{name}.{part}", t, shape, dtype, device)


def flatten_norm(norm: Norm | None) -> tuple[Any, ...]:
    """The norm as `NORM_SCHEMA` has it."""
    return (None, None, None, 0.0) if norm is None else (norm.kind, norm.weight, norm.bias, norm.eps)


def unflatten_norm(kind: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Norm | None:
    return None if kind is None else Norm(kind, weight, bias, eps)


def apply_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm as torch computes it: float32 inside for half dtypes, rounded once to x's dtype."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
