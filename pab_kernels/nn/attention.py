"""`PABAttention`: self attention over space or time, computed or broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..broadcast.turn import Turn
from ..ops.short_attention import MAX_TOKENS
from .broadcast_module import BroadcastModule
from .parts import Parts, PartsModule, check_input, fresh, refuse_options, stored_dtype
from .qk_norm import with_norm
from .sources import read_parts


class PABAttention(BroadcastModule):
    """Self attention that a plan computes or broadcasts.

        1. q, k, v = split(qkv(x)), heads of D channels; q = rope(q_norm(q)); k = rope(k_norm(k))
        2. out = proj(softmax(softmax_scale q k^T) v), over space, or over time where the kind is "temporal"

    Attention reads views of the projection in either order; `short_attention` serves up to 64 frames. For full
    attention over space and time pass x as `[B, N, C]` with kind "spatial". Without `enable` this is a plain module.
    `state_dict` has `qkv`, or `q`, `k`, `v`; `proj`, `q_norm`, `k_norm`; after `from_module`, the names of the source.

    Args:
        channels: C.
        heads: H; C / H is 32 to 128.
        kind: "spatial" or "temporal".
        layer: index of its block, for rules restricted to some layers.
        packed: whether q, k and v share one projection.
        bias: whether these projections have biases; the output projection always does.
        qk_norm: None, "rms" or "layer" (per head), or "rms_across_heads".
        eps: of the norms.
        device, dtype: of the weights.

    Raises:
        ValueError: an argument is not supported.

    Example:
        >>> attention = PABAttention(64, heads=2, kind="temporal", qk_norm="rms")
        >>> attention(torch.randn(1, 5, 12, 64)).shape  # 12 places attend over 5 frames
        torch.Size([1, 5, 12, 64])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        kind: str = "spatial",
        layer: int = 0,
        *,
        packed: bool = True,
        bias: bool = True,
        qk_norm: str | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        widths = {"qkv": (channels, 3 * channels)} if packed else dict.fromkeys("qkv", (channels, channels))
        self._take(fresh(channels, heads, widths, bias, qk_norm, eps, device=device, dtype=dtype), kind, layer)

    @classmethod
    def from_module(cls, module: nn.Module, kind: str = "spatial", layer: int = 0) -> PABAttention:
        """The same attention as `module`, with shared weights under the same names.

        It takes the arguments of `PABAttention`, with x in batch-first order, not those of `module`.

        Args:
            module: diffusers' `Attention`, `nn.MultiheadAttention`, or timm-like (`qkv` or `q`, `k`, `v`; `proj`,
                `num_heads`, perhaps `q_norm` and `k_norm`).
            kind, layer: as in `PABAttention`.

        Returns:
            A module that shares the parameters of `module`.

        Raises:
            TypeError: the class of the module is not supported.
            ValueError: the kind or an option of the module is not supported.
        """
        attention = cls.__new__(cls)
        attention._take(module, kind, layer)
        return attention

    def _take(self, source: nn.Module, kind: str, layer: int) -> None:
        if kind not in ("spatial", "temporal"):
            raise ValueError(
                f"got kind {kind!r}; 'spatial' and 'temporal' are supported: use PABCrossAttention for the text"
            )
        inner = SelfAttention(source, read_parts(source, cross=False), kind == "temporal")
        super().__init__(inner, kind, layer)
        self.training = source.training

    def forward(self, x: Tensor, rope: ops.Rope | None = None, **options: Any) -> Tensor:
        """Attention over T or S, by kind, or over N.

        Args:
            x: `[B, T, S, C]` or `[B, N, C]`.
            rope: tables for T, S or N positions; see `rotary_embedding`.
            options: arguments of other attention modules, which must be None.

        Returns:
            The shape of x, with the channels of the output projection.

        Raises:
            TypeError, ValueError: an argument is not supported.
        """
        refuse_options(options, "x and rope")
        return super().forward(x, rope)


class SelfAttention(PartsModule):
    """The attention that `PABAttention` broadcasts."""

    def __init__(self, source: nn.Module, parts: Parts, temporal: bool) -> None:
        super().__init__(source, parts)
        self.temporal = temporal

    def attend(  # type: ignore[override]
        self, x: Tensor, rope: ops.Rope | None = None, *, store: Turn | None = None
    ) -> tuple[Tensor, Tensor | ops.Quantized | None]:
        """Attention as in `PABAttention.forward`, `[B, S, T, H, D]` where it is over frames."""
        parts = self.parts
        check_input("x", x, "[B, T, S, C] or [B, N, C]", (3, 4), parts.channels)
        q, k, v = self.project(parts.projections, x)
        if self._across_frames(x):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, S, T, H, D]
        q, q_norm = with_norm(q, self.norm(parts.q_norm))
        k, k_norm = with_norm(k, self.norm(parts.k_norm))
        operation = ops.short_attention if self.temporal and q.shape[-3] <= MAX_TOKENS else ops.attention
        kept = stored_dtype(q, store)
        return operation(
            q, k, v, softmax_scale=parts.softmax_scale, q_norm=q_norm, k_norm=k_norm, rope=rope, store_dtype=kept
        )

    def arrange(self, out: Tensor, x: Tensor) -> Tensor:
        """See `PartsModule.arrange`."""
        return out.transpose(1, 2) if self._across_frames(x) else out

    def _across_frames(self, x: Tensor) -> bool:
        return self.temporal and x.ndim == 4
