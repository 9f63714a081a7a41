"""Cases of `project_residual`: the output projection with gate and addition, with what it stores, and with a cached
output that is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.ops import Line, Quantized, linear_flops, project_residual, quantize

from .candidates import backends, plain_torch
from .case import Case, Draw, Inputs, Outputs, doubled, floats, plain_value
from .geometries import Geometry

OP = "project_residual"


@dataclass(frozen=True)
class Options:
    """What varies: what is stored, its dtype (None for the activations'), and the cached outputs added, by dtype, or
    lines through two."""

    store: Literal["pre_gate", "post_gate"] | None = None
    store_dtype: torch.dtype | None = None
    slots: tuple[torch.dtype | None, ...] = ()
    lines: bool = False
    gated: bool = True
    bias: bool = True


INT8, FP8, INT4 = torch.int8, torch.float8_e4m3fn, torch.int4

TIMED = {
    "gate": Options(),
    "gate, store": Options("pre_gate"),
    "gate, store int8": Options("pre_gate", INT8),
    "gate, store fp8": Options("pre_gate", FP8),
    "gate, store int4": Options("pre_gate", INT4),
    "gate, 1 slot": Options(slots=(None,)),
    "gate, 1 line": Options(slots=(None,), lines=True),
}

FURTHER = {
    "post-gate store fp8, 2 mixed slots": Options("post_gate", FP8, (None, INT8)),
    "post-gate store int4, 1 int4 slot": Options("post_gate", INT4, (INT4,)),
    "no gate, no bias, store": Options("pre_gate", gated=False, bias=False),
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

        return {
            "a": draw(batch, tokens, channels),
            "weight": draw(channels, channels) * channels**-0.5,
            "bias": draw(channels) if options.bias else None,
            "x": draw(batch, tokens, channels),
            "gate": draw(batch, 1, channels) if options.gated else None,
            "slots": [slot(kept) for kept in options.slots],
            "gates": [draw(batch, 1, channels) for _ in options.slots],
        }

    exact_options = replace(options, store_dtype=None)
    plain = plain_of(options)
    return Case(
        OP,
        name,
        title,
        {"batch": batch, "tokens": tokens, "channels": channels},
        dtype,
        linear_flops(batch * tokens, channels, channels),
        draw,
        plain,
        exact=lambda inputs: _looked_at(plain_of(exact_options)(doubled(inputs))),
        looked_at=_looked_at,
        candidates=(*backends(OP, partial(_call, options)), *plain_torch(plain)),
    )


def plain_of(options: Options) -> Callable[[Inputs], Outputs]:
    """The code of a user who has no fused operation."""

    def plain(inputs: Inputs) -> Outputs:
        projected = F.linear(inputs["a"], inputs["weight"], inputs["bias"])
        gated = inputs["gate"] * projected if options.gated else projected
        x = inputs["x"] + gated
        for slot, gate in zip(inputs["slots"], inputs["gates"], strict=True):
            x = x + gate * plain_value(slot, x.dtype)
        if options.store is None:
            return x, None
        stored = projected if options.store == "pre_gate" else gated
        return x, stored if options.store_dtype is None else quantize(stored, options.store_dtype)

    return plain


def _call(options: Options, backend: str, inputs: Inputs) -> Outputs:
    given = {name: inputs[name] for name in ("a", "weight", "bias", "x", "gate", "slots", "gates")}
    return project_residual(**given, store=options.store, store_dtype=options.store_dtype, backend=backend)


def _looked_at(outputs: Outputs) -> tuple[Tensor, ...]:
    return tuple(floats(t) for t in outputs if t is not None)
