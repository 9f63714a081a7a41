"""Cases of `broadcast_residual`: the plain norm-modulate, and one to three slots, or lines, in the model's dtype or 8
or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.ops import Line, Norm, Quantized, broadcast_residual, quantize

from .candidates import backends, plain_torch
from .case import Case, Draw, Inputs, Outputs, doubled, plain_value
from .geometries import Geometry

OP = "broadcast_residual"
EPS = 1e-6


@dataclass(frozen=True)
class Options:
    """What varies: dtype of each slot (None for the activations'), whether they are lines through two, and what comes
    with them."""

    slots: tuple[torch.dtype | None, ...] = ()
    gated: bool = True
    lines: bool = False
    norm: Literal["layer", "rms"] | None = "layer"
    affine: bool = False
    modulated: bool = True


INT8, FP8, INT4 = torch.int8, torch.float8_e4m3fn, torch.int4

TIMED = {
    "norm": Options(),
    "1 slot": Options((None,)),
    "2 slots": Options((None,) * 2),
    "3 slots": Options((None,) * 3),
    "1 int8 slot": Options((INT8,)),
    "1 fp8 slot": Options((FP8,)),
    "1 int4 slot": Options((INT4,)),
    "3 int8 slots": Options((INT8,) * 3),
    "3 int4 slots": Options((INT4,) * 3),
    "1 line": Options((None,), lines=True),
    "1 int8 line": Options((INT8,), lines=True),
}

FURTHER = {
    "2 mixed lines, affine rms": Options((None, FP8), lines=True, norm="rms", affine=True, modulated=False),
    "1 ungated slot, affine layer": Options((None,), gated=False, affine=True),
    "2 int4 lines": Options((INT4, INT4), lines=True),
    "2 int8 slots, no norm": Options((INT8, INT8), norm=None, modulated=False),
}
"""Only at small shapes, for checks."""


def cases(name: str, geometry: Geometry, dtype: torch.dtype) -> Iterator[Case]:
    """The cases at this geometry."""
    for title, options in {**TIMED, **(FURTHER if geometry.small else {})}.items():
        yield _case(name, geometry, dtype, title, options)


def _case(name: str, geometry: Geometry, dtype: torch.dtype, title: str, options: Options) -> Case:
    batch, tokens, channels = geometry.batch, geometry.frames * geometry.tokens, geometry.channels

    def draw(draw: Draw) -> Inputs:
        def output(kept: torch.dtype | None) -> Tensor | Quantized:
            values = draw(batch, tokens, channels)
            return values if kept is None else quantize(values, kept)

        def slot(kept: torch.dtype | None) -> Tensor | Quantized | Line:
            return Line(output(kept), output(kept), draw(1, dtype=torch.float32)[0]) if options.lines else output(kept)

        count = len(options.slots)
        return {
            "x": draw(batch, tokens, channels),
            "slots": [slot(kept) for kept in options.slots],
            "gates": [draw(batch, 1, channels) if options.gated else None for _ in range(count)],
            "weight": draw(channels) if options.affine else None,
            "bias": draw(channels) if options.affine and options.norm == "layer" else None,
            "shift": draw(batch, 1, channels) if options.modulated else None,
            "scale": draw(batch, 1, channels) if options.modulated else None,
        }

    plain = plain_of(options)
    return Case(
        OP,
        name,
        title,
        {"batch": batch, "tokens": tokens, "channels": channels},
        dtype,
        0,
        draw,
        plain,
        exact=lambda inputs: _looked_at(plain(doubled(inputs))),
        looked_at=_looked_at,
        candidates=(*backends(OP, partial(_call, options)), *plain_torch(plain)),
    )


def plain_of(options: Options) -> Callable[[Inputs], Outputs]:
    """The code of a user who has no fused operation."""

    def plain(inputs: Inputs) -> Outputs:
        x = inputs["x"]
        for slot, gate in zip(inputs["slots"], inputs["gates"], strict=True):
            addition = plain_value(slot, x.dtype)
            x = x + (addition if gate is None else gate * addition)
        x_new = x if options.slots else None
        if options.norm is None:
            return x_new, None
        if options.norm == "layer":
            y = F.layer_norm(x, x.shape[-1:], inputs["weight"], inputs["bias"], EPS)
        else:
            y = F.rms_norm(x, x.shape[-1:], inputs["weight"], EPS)
        return x_new, y * (1 + inputs["scale"]) + inputs["shift"] if options.modulated else y

    return plain


def _call(options: Options, backend: str, inputs: Inputs) -> Outputs:
    norm = None if options.norm is None else Norm(options.norm, inputs["weight"], inputs["bias"], EPS)
    given = {name: inputs[name] for name in ("gates", "shift", "scale")}
    x, y = broadcast_residual(inputs["x"], inputs["slots"], norm=norm, backend=backend, **given)
    return x if options.slots else None, y


def _looked_at(outputs: Outputs) -> tuple[Tensor, ...]:
    return tuple(t for t in outputs if t is not None)
