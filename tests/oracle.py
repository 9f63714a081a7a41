"""The oracle: PAB on diffusers' Latte, slow and obvious.

It knows nothing of plans, slots, streams or fused operations. Every block's `forward` is written out plainly after
diffusers' `BasicTransformerBlock` (adaLN-single); every sublayer's output is written down when it is computed. At a
step at which the rule asks for reuse the last one is said again, or the straight line through the last two is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Reuse at step i iff `i % range != 0`, counted from the first call, and i lies in the window.

    Args:
        range: steps from one compute to the next.
        window: `(lo, hi)`.
        unit: of the window: "fraction" (`lo <= i / N < hi`), "step" (`lo <= i < hi`) or "timestep" (`lo < int(t) <
            hi`).
        layers: blocks under this rule; None for all.
        reuse: "hold", the last output c, or "linear", `c + w (c - c_prev)`.
    """

    range: int
    window: tuple[float, float] = (0.15, 0.85)
    unit: str = "fraction"
    layers: tuple[int, ...] | None = None
    reuse: str = "hold"

    def reuses(self, step: int, first: int, timesteps: Sequence[float]) -> bool:
        lo, hi = self.window
        if (step - first) % self.range == 0:
            return False
        if self.unit == "fraction":
            return lo <= step / len(timesteps) < hi
        if self.unit == "step":
            return lo <= step < hi
        return lo < int(timesteps[step]) < hi


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as 8 bits and a scale for each 128 channels would give it back, or 4 bits and one for each 32."""
    if dtype == torch.int4:
        return rounded_to_4_bits(x)
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    pieces = []
    for piece in x.float().split(128, dim=-1):
        scale = piece.abs().amax(-1, keepdim=True) / largest
        q = piece / torch.where(scale == 0, torch.ones_like(scale), scale)
        q = q.round() if dtype == torch.int8 else q
        pieces.append(q.clamp(-largest, largest).to(dtype).float() * scale)
    return torch.cat(pieces, -1).to(x.dtype)


def rounded_to_4_bits(x: Tensor) -> Tensor:
    """x in whole numbers of a step, of which the largest number of 32 channels is -8."""
    pieces = []
    for piece in x.float().split(32, dim=-1):
        step = (piece.gather(-1, piece.abs().argmax(-1, keepdim=True)) / -8).bfloat16().float()
        whole = torch.where(step == 0, 0, piece * (1 / step)).round().clamp(-8, 7)
        pieces.append(whole * step)
    return torch.cat(pieces, -1).to(x.dtype)


class Oracle:
    """Runs a plain Latte under rules.

    Args:
        model: diffusers' `LatteTransformer3DModel`, not enabled.
        rules: by kind; where several apply to a block the last wins.
        timesteps: of the full schedule.
        first: the step that is called first.
        post_gate: whether outputs are written down after the gate.
        dtype: the dtype of 8 or 4 bits that outputs are written down in, or None.
        weights: by sublayer, step, s and p, what stands for the weight of the line.
    """

    def __init__(
        self,
        model: Any,
        rules: dict[str, Rule | Sequence[Rule]],
        timesteps: Sequence[float],
        *,
        first: int = 0,
        post_gate: bool = False,
        dtype: torch.dtype | None = None,
        weights: Mapping[tuple[str, int, int, int], float] | None = None,
    ) -> None:
        self.model = model
        self.weights = weights or {}
        self.rules = {kind: [rule] if isinstance(rule, Rule) else list(rule) for kind, rule in rules.items()}
        self.timesteps = [float(t) for t in timesteps]
        self.first = first
        self.post_gate = post_gate
        self.dtype = dtype
        self.written: dict[
            tuple[str, str], list[tuple[int, Tensor]]
        ] = {}  # by context and sublayer: all (step, output)
        self.computed: dict[str, list[tuple[str, int]]] = {}  # by sublayer: (context, step)

    def __call__(self, context: str, step: int, *args: Any, **kwargs: Any) -> Tensor:
        """The model's output in a context at a step."""
        with self._rewritten(context, step):
            return self.model(*args, **kwargs, return_dict=False)[0]

    @contextlib.contextmanager
    def _rewritten(self, context: str, step: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for group, kind in (("transformer_blocks", "spatial"), ("temporal_transformer_blocks", "temporal")):
                for layer, block in enumerate(getattr(self.model, group)):
                    forward = self._block(block, f"{group}.{layer}", kind, layer, context, step)
                    stack.enter_context(mock.patch.object(block, "forward", forward))
            yield

    def _said_again(self, name: str, kind: str, layer: int, context: str, step: int) -> Tensor | None:
        """What a reuse adds to the stream; None where the sublayer is to be computed."""
        rules = [rule for rule in self.rules.get(kind, ()) if rule.layers is None or layer in rule.layers]
        written = self.written.get((context, name), [])
        if not rules or not rules[-1].reuses(step, self.first, self.timesteps) or not written:
            return None
        kept = [(at, out if self.dtype is None else rounded(out, self.dtype)) for at, out in written[-2:]]
        if rules[-1].reuse == "hold" or len(kept) == 1:
            return kept[-1][1]
        (p, c_prev), (s, c) = kept
        w = torch.tensor(self.weights.get((name, step, s, p), (step - s) / (s - p)))
        return (c.float() + w * (c.float() - c_prev.float())).to(c.dtype)

    def _write_down(self, name: str, context: str, step: int, out: Tensor) -> None:
        self.computed.setdefault(name, []).append((context, step))
        self.written.setdefault((context, name), []).append((step, out.clone()))

    def _sublayer(
        self, name: str, kind: str, layer: int, context: str, step: int, compute: Callable[[], Tensor]
    ) -> Tensor:
        """What is added to the stream: what `compute` gives, or what is said again of what it gave in this context."""
        again = self._said_again(name, kind, layer, context, step)
        if again is not None:
            return again
        out = compute()
        self._write_down(name, context, step, out)
        return out

    def _block(self, block: Any, name: str, kind: str, layer: int, context: str, step: int) -> Callable[..., Tensor]:
        def added(x: Tensor, part: str, part_kind: str, gate: Tensor | None, compute: Callable[[], Tensor]) -> Tensor:
            """x and the gated output of a sublayer."""
            if gate is not None and self.post_gate:
                return self._sublayer(f"{name}.{part}", part_kind, layer, context, step, lambda: gate * compute()) + x
            out = self._sublayer(f"{name}.{part}", part_kind, layer, context, step, compute)
            return (out if gate is None else gate * out) + x

        def inside(x: Tensor, text: Tensor | None, text_mask: Tensor | None, timestep: Tensor) -> Tensor:
            shift1, scale1, gate1, shift2, scale2, gate2 = (
                block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
            ).chunk(6, dim=1)
            first = x
            x = added(x, "attn1", kind, gate1, lambda: block.attn1(block.norm1(first) * (1 + scale1) + shift1))
            if block.attn2 is not None:
                stream = x
                x = added(x, "attn2", "cross", None, lambda: block.attn2(stream, text, text_mask))
            last = x
            return added(x, "ff", "mlp", gate2, lambda: block.ff(block.norm2(last) * (1 + scale2) + shift2))

        def forward(
            x: Tensor,
            mask: Any,
            text: Tensor | None,
            text_mask: Tensor | None,
            timestep: Tensor,
            *rest: Any,
            **kwargs: Any,
        ) -> Tensor:
            change = self._said_again(name, "block", layer, context, step)
            if change is None:
                out = inside(x, text, text_mask, timestep)
                self._write_down(name, context, step, out - x)
                return out
            return change + x

        return forward
