"""What one of several ranks sends and keeps, from the shapes of a call on the meta device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...broadcast.costs import SublayerRun
from ...parallel.frames import frame_family_of
from ...rules.plan import WHOLE, Plan
from ...rules.traffic import SENDER, Layout, Method, Shapes, Traffic, part, traffic
from .measure import Measured
from .model_calls import ModelCall


@dataclass(frozen=True)
class RanksForecast:
    """One of several ranks, over a whole generation.

    Args:
        layout: of the ranks.
        method: what the stream is split in.
        traffic: what the rank sends.
        peak_cache_bytes: peak size of its slots, and of what its sublayers keep, by cache dtype.
    """

    layout: Layout
    method: Method
    traffic: Traffic
    peak_cache_bytes: Mapping[str, int]

    def __str__(self) -> str:
        branches = "2 branches of guidance x " if self.layout.cfg > 1 else ""
        return f"{self.layout.ranks} rank(s): {branches}{self.layout.sequence} part(s) of the {self.method}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return (
            dataclasses.asdict(self.layout)
            | {"ranks": self.layout.ranks, "method": self.method}
            | self.traffic.to_dict()
            | {"peak_cache_bytes": dict(self.peak_cache_bytes)}
        )


def shapes_of(how: ModelCall, plan: Plan, measured: Measured, model: Any, batch: int, text: int) -> Shapes:
    """The shapes of one call, from those of the outputs of attention.

    Args:
        how: the model is called.
        plan: with the model's sublayers.
        measured: a call of the model with all of the batch.
        model: the transformer.
        batch: clips in a batch.
        text: tokens of the prompt.
    """
    name = next(s.name for s in plan.sublayers if s.kind == SENDER[how.split])
    outputs = measured.runs[name].outputs
    first, dtype = outputs[0]
    rows, channels = how.batch * batch, first[-1]
    if how.split == "frames":
        joined = len(first) == 3  # [B S, T, C] instead of [B, T, S, C]
        frames, family = first[1], frame_family_of(model)
        tokens, width = math.prod(first) // (rows * frames * channels), measured.output_bytes // (rows * frames)
        least = 1 if family is None else family.least
        return Shapes(
            rows, frames, tokens, channels, dtype.itemsize, width, calls=how.contexts, least=least, joined=joined
        )
    joint = text if how.joint_text else 0
    tokens = sum(shape[1] for shape, _ in outputs) - joint
    width, heads = measured.output_bytes // (rows * tokens), model.config["num_attention_heads"]
    return Shapes(rows, 1, tokens, channels, dtype.itemsize, width, heads, joint, how.contexts)


def one_of(layout: Layout, how: ModelCall, measured: Measured, shapes: Shapes) -> Measured:
    """What one rank runs of a call.

    Args:
        layout: of the ranks.
        how: the model is called.
        measured: the call on one rank alone.
        shapes: of that call.
    """
    runs = {
        place: run if run.name == WHOLE.name else dataclasses.replace(run, outputs=_part(run, layout, how, shapes))
        for place, run in measured.runs.items()
    }
    kept = {name: (flops, size // layout.cfg) for name, (flops, size) in measured.kept.items()}
    return dataclasses.replace(measured, runs=runs, kept=kept)


def on_ranks(
    layout: Layout, how: ModelCall, plan: Plan, shapes: Shapes, peak_cache_bytes: Mapping[str, int]
) -> RanksForecast:
    """The forecast of one rank.

    Args:
        layout: of the ranks.
        how: the model is called.
        plan: of the generation.
        shapes: of a call on one rank alone.
        peak_cache_bytes: see `RanksForecast`.

    Raises:
        ValueError: the ranks do not divide the model.
    """
    if how.split == "tokens":  # their outputs are sent before the projection, and kept behind it
        layout = dataclasses.replace(layout, return_dtype=None)
    return RanksForecast(layout, how.split, traffic(layout, how.split, shapes, plan), peak_cache_bytes)


def _part(run: SublayerRun, layout: Layout, how: ModelCall, shapes: Shapes) -> tuple[Any, ...]:
    """Shapes and dtypes of a rank's part of the outputs of a sublayer."""
    n, rows = layout.sequence, shapes.batch // layout.cfg
    if how.split == "frames":
        part_of_frames = rows * shapes.frames_of(n) * shapes.tokens
        return tuple(((part_of_frames, shape[-1]), dtype) for shape, dtype in run.outputs)
    text = part(shapes.text, n)
    tokens = {shapes.text: text, shapes.tokens + shapes.text: part(shapes.tokens, n) + text}
    tokens[shapes.tokens] = part(shapes.tokens, n)
    return tuple(((rows, tokens[shape[1]], shape[-1]), dtype) for shape, dtype in run.outputs)
