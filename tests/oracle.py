"""The oracle: PAB on diffusers' Latte, slow and obvious.

It knows nothing of plans, slots, streams or fused operations. Every block's `forward` is written out plainly after diffusers'
`BasicTransformerBlock` (adaLN-single); every sublayer's output is written down when it is computed, and said again at a step at which the
rule asks for reuse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
        unit: of the window: "fraction" (`lo <= i / N < hi`), "step" (`lo <= i < hi`) or "timestep" (`lo < int(t) < hi`).
        layers: blocks under this rule; None for all.
    """

    range: int
    window: tuple[float, float] = (0.15, 0.85)
    unit: str = "fraction"
    layers: tuple[int, ...] | None = None

    def reuses(self, step: int, first: int, timesteps: Sequence[float]) -> bool:
        lo, hi = self.window
        if (step - first) % self.range == 0:
            return False
        if self.unit == "fraction":
            return lo <= step / len(timesteps) < hi
        if self.unit == "step":
            return lo <= step < hi
        return lo < int(timesteps[step]) < hi


def rounded_to_8_bits(x: Tensor, dtype: torch.dtype, group: int = 128) -> Tensor:
    """x as 8 bits and a scale for each `group` channels would give it back."""
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    pieces = []
    for piece in x.float().split(group, dim=-1):
        scale = piece.abs().amax(-1, keepdim=True) / largest
        q = piece / torch.where(scale == 0, torch.ones_like(scale), scale)
        q = q.round() if dtype == torch.int8 else q
        pieces.append(q.clamp(-largest, largest).to(dtype).float() * scale)
    return torch.cat(pieces, -1).to(x.dtype)


class Oracle:
    """Runs a plain Latte under rules.

    Args:
        model: diffusers' `LatteTransformer3DModel`, not enabled.
        rules: by kind; where several apply to a block the last wins.
        timesteps: of the full schedule.
        first: the step that is called first.
        post_gate: whether outputs are written down after the gate.
        dtype: the 8-bit dtype that outputs are written down in, or None.
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
    ) -> None:
        self.model = model
        self.rules = {kind: [rule] if isinstance(rule, Rule) else list(rule) for kind, rule in rules.items()}
        self.timesteps = [float(t) for t in timesteps]
        self.first = first
        self.post_gate = post_gate
        self.dtype = dtype
        self.written: dict[tuple[str, str], Tensor] = {}  # by context and sublayer
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

    def _says_again(self, kind: str, layer: int, step: int) -> bool:
        found = [rule for rule in self.rules.get(kind, ()) if rule.layers is None or layer in rule.layers]
        return bool(found) and found[-1].reuses(step, self.first, self.timesteps)

    def _sublayer(self, name: str, kind: str, layer: int, context: str, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, or gave when it ran last in this context."""
        if self._says_again(kind, layer, step) and (context, name) in self.written:
            out = self.written[context, name]
            return out if self.dtype is None else rounded_to_8_bits(out, self.dtype)
        out = compute()
        self.computed.setdefault(name, []).append((context, step))
        self.written[context, name] = out.clone()
        return out

    def _block(self, block: Any, name: str, kind: str, layer: int, context: str, step: int) -> Callable[..., Tensor]:
        def gated(part: str, part_kind: str, gate: Tensor | None, compute: Callable[[], Tensor]) -> Tensor:
            if gate is None:
                return self._sublayer(f"{name}.{part}", part_kind, layer, context, step, compute)
            if self.post_gate:
                return self._sublayer(f"{name}.{part}", part_kind, layer, context, step, lambda: gate * compute())
            return gate * self._sublayer(f"{name}.{part}", part_kind, layer, context, step, compute)

        def inside(x: Tensor, text: Tensor | None, text_mask: Tensor | None, timestep: Tensor) -> Tensor:
            shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)).chunk(
                6, dim=1
            )
            x = gated("attn1", kind, gate1, lambda: block.attn1(block.norm1(x) * (1 + scale1) + shift1)) + x
            if block.attn2 is not None:
                stream = x
                x = gated("attn2", "cross", None, lambda: block.attn2(stream, text, text_mask)) + x
            last = x
            return gated("ff", "mlp", gate2, lambda: block.ff(block.norm2(last) * (1 + scale2) + shift2)) + x

        def forward(
            x: Tensor, mask: Any, text: Tensor | None, text_mask: Tensor | None, timestep: Tensor, *rest: Any, **kwargs: Any
        ) -> Tensor:
            if not self._says_again("block", layer, step) or (context, name) not in self.written:
                out = inside(x, text, text_mask, timestep)
                self.computed.setdefault(name, []).append((context, step))
                self.written[context, name] = out - x
                return out
            change = self.written[context, name]
            return (change if self.dtype is None else rounded_to_8_bits(change, self.dtype)) + x

        return forward
