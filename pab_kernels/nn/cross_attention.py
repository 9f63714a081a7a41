"""`PABCrossAttention`: attention to the text, computed or broadcast, with its keys and values computed once a run."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..broadcast.call import Call
from ..broadcast.slots import Key
from ..broadcast.turn import Turn
from ..ops.flops import linear_flops
from .broadcast_module import BroadcastModule
from .parts import PartsModule, check_input, fresh, refuse_options, stored_dtype
from .qk_norm import with_norm
from .sources import read_parts


class PABCrossAttention(BroadcastModule):
    """Attention to the text that a plan computes or broadcasts.

        1. q = q_norm(q(x)); k, v = split(kv(text)); k = k_norm(k); heads of D channels
        2. out = proj(softmax(softmax_scale q k^T) v), over the first text_lengths tokens

    Under PAB, k and v are computed once for each context of a generation and kept until its last step, in addition to
    the slots and counted with them. They are reused while `text`, the weights and the hooks are the same objects and
    unchanged (by torch's count of writes): results are bit-identical. A projection that is no plain `nn.Linear`,
    such as one with a LoRA, is computed in every call. A model that embeds its text in every call gains nothing: embed
    it before the run. Tensors made under `torch.inference_mode` do not count writes, so text made there is projected in
    every call; writes through `.data` are not counted either.

    Without `enable` this is a plain module. `state_dict` has `q`, and `kv` or `k`, `v`; `proj`, `q_norm`, `k_norm`;
    after `from_module`, the names of the source.

    Args:
        channels: C of x.
        heads: H; C / H is 32 to 128.
        text_channels: C of the text; None for that of x.
        packed: whether k and v share one projection.
        layer, bias, qk_norm, eps, device, dtype: as in `PABAttention`.

    Raises:
        ValueError: an argument is not supported.

    Example:
        >>> attention = PABCrossAttention(64, heads=2, text_channels=48)
        >>> attention(torch.randn(1, 5, 12, 64), torch.randn(1, 7, 48), torch.tensor([4])).shape
        torch.Size([1, 5, 12, 64])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        text_channels: int | None = None,
        layer: int = 0,
        *,
        packed: bool = True,
        bias: bool = True,
        qk_norm: str | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        text = channels if text_channels is None else text_channels
        of_text = {"kv": (text, 2 * channels)} if packed else dict.fromkeys("kv", (text, channels))
        widths = {"q": (channels, channels), **of_text}
        self._take(fresh(channels, heads, widths, bias, qk_norm, eps, device=device, dtype=dtype), layer)

    @classmethod
    def from_module(cls, module: nn.Module, layer: int = 0) -> PABCrossAttention:
        """The same attention as `module`, with shared weights under the same names.

        Args:
            module: diffusers' `Attention`, `nn.MultiheadAttention`, or timm-like (`q` and `kv`, `q_linear` and
                `kv_linear`, or `q`, `k` and `v`; `proj`, `num_heads`, perhaps `q_norm` and `k_norm`).
            layer: as in `PABCrossAttention`.

        Returns:
            A module that shares the parameters of `module`.

        Raises:
            TypeError: the class of the module is not supported.
            ValueError: an option of the module is not supported.
        """
        attention = cls.__new__(cls)
        attention._take(module, layer)
        return attention

    def _take(self, source: nn.Module, layer: int) -> None:
        super().__init__(CrossAttention(source, read_parts(source, cross=True)), "cross", layer)
        self.training = source.training

    def forward(self, x: Tensor, text: Tensor, text_lengths: Tensor | None = None, **options: Any) -> Tensor:
        """Attention of all tokens of x to the text.

        Args:
            x: `[B, T, S, C]` or `[B, N, C]`.
            text: `[B, L, C]`.
            text_lengths: int32 or int64 `[B]`, how many of the L tokens are text; None for all.
            options: arguments of other attention modules, which must be None.

        Returns:
            The shape of x, with the channels of the output projection.

        Raises:
            TypeError, ValueError: an argument is not supported.
        """
        refuse_options(options, "x, text and text_lengths")
        member = None if torch.compiler.is_compiling() else self._member
        call = None if member is None else member.broadcaster.call
        kept = None if member is None or call is None else kept_text(call, member.sublayer.name)
        return super().forward(x, text, text_lengths, kept)


def kept_text(call: Call, sublayer: str, text: Sequence[Tensor] = ()) -> KeptText | None:
    """Where a call of the model keeps keys and values of a sublayer: nowhere in a compiled graph or a CUDA graph.

    Args:
        call: of the model.
        sublayer: name of the cross attention.
        text: see `KeptText`.
    """
    return None if torch.compiler.is_compiling() or call.arena.fixed else KeptText(call, sublayer, text)


@dataclass(frozen=True)
class KeptText:
    """Keys and values kept in a context of a generation, from the first planned run of a sublayer to its last one.

    Args:
        call: of the model.
        sublayer: name of the cross attention.
        text: the tensors that the text is made from; empty for the text itself.
    """

    call: Call
    sublayer: str
    text: Sequence[Tensor] = ()

    @property
    def name(self) -> str:
        """The key in the arena of the context."""
        return f"{self.sublayer}, keys and values"

    @property
    def last(self) -> bool:
        """Whether the sublayer runs for the last time."""
        return self.call.step >= self.call.plan.runs[self.sublayer][-1]

    def get(self, sources: Sequence[Tensor]) -> Any:
        """The kept value, if it was made from these tensors as they are now; else None. The last run releases it."""
        slot = self.call.arena.get(self.name)
        if self.last:
            self.call.arena.release(self.name)
        if slot is None or _uncounted(sources):
            return None
        value, made_from = slot.value
        same = len(made_from) == len(sources) and all(
            ref() is t and n == t._version for (ref, n), t in zip(made_from, sources, strict=True)
        )
        return value if same else None

    def put(self, value: Any, sources: Sequence[Tensor]) -> None:
        """Keep a value made from these tensors."""
        if not (self.last or _uncounted(sources)):
            made_from = [(weakref.ref(t), t._version) for t in sources]
            self.call.arena.put(self.name, "text", (value, made_from), Key.of(sources[0]), self.call.step)


def _uncounted(tensors: Sequence[Tensor]) -> bool:
    """Whether torch does not count the writes to one of these tensors."""
    return any(t.is_inference() for t in tensors)


class CrossAttention(PartsModule):
    """The attention that `PABCrossAttention` broadcasts."""

    def attend(  # type: ignore[override]
        self,
        x: Tensor,
        text: Tensor,
        text_lengths: Tensor | None = None,
        kept: KeptText | None = None,
        *,
        store: Turn | None = None,
    ) -> tuple[Tensor, Tensor | ops.Quantized | None]:
        """Attention as in `PABCrossAttention.forward`, `[B, N, H, D]`; `kept` has keys and values of earlier steps."""
        parts = self.parts
        check_input("x", x, "[B, T, S, C] or [B, N, C]", (3, 4), parts.channels)
        check_input("text", text, "[B, L, C]", (3,), parts.text_channels)
        if text.shape[0] != x.shape[0]:
            sizes = f"text has a batch of {text.shape[0]} and x of {x.shape[0]}"
            raise ValueError(f"{sizes}; equal sizes are supported: pass x as [B, T, S, C]")
        (q,) = self.project(parts.projections[:1], x)
        q, q_norm = with_norm(q.flatten(1, -3), self.norm(parts.q_norm))  # [B, N, H, D]
        k, k_norm, v = self._keys_values(text, q.dtype, kept)
        scale, dtype = parts.softmax_scale, stored_dtype(q, store)
        return ops.attention(
            q, k, v, softmax_scale=scale, key_lengths=text_lengths, q_norm=q_norm, k_norm=k_norm, store_dtype=dtype
        )

    def arrange(self, out: Tensor, x: Tensor) -> Tensor:
        """See `PartsModule.arrange`."""
        return out.unflatten(1, x.shape[1:-1])

    def _keys_values(
        self, text: Tensor, dtype: torch.dtype, kept: KeptText | None
    ) -> tuple[Tensor, ops.QKNorm | None, Tensor]:
        """k `[B, L, H, D]`, its norm, v `[B, L, H, D]`."""
        of_text, norm = self.parts.projections[1:], self.norm(self.parts.k_norm)
        weights = [] if kept is None else [p.weights(self) for p in of_text]
        if kept is None or None in weights:
            k, v = self.project(of_text, text)
            return *with_norm(k, norm), v
        sources = [
            *(kept.text or (text,)),
            *(w for some in weights for w in some or ()),
            *(() if norm is None else norm.parameters()),
        ]
        hooks = [p.hooks(self) for p in of_text]
        held = kept.get(sources)
        if held is None or held[0].dtype != dtype or held[-1] != hooks:  # autocast may have changed
            held = (*self._keys_values(text, dtype, None), hooks)
            kept.put(held, sources)
        else:
            outputs = sum(p.count for p in of_text) * self.parts.heads * self.parts.head_dim
            kept.call.spare("cross", linear_flops(text.shape[0] * text.shape[1], text.shape[2], outputs))
        return held[:3]
