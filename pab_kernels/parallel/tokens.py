"""Sequence parallelism for models with attention over all tokens (Ulysses): each rank has some of the tokens.

The residual stream `[B, N, C]` lies split in N, and text that takes part in self attention `[B, L, C]` in L. Self
attention gets all tokens of H / n heads instead of all heads of some tokens: q, k and v are sent in one message, and
its output in another, together 4 M / n elements, M = B (N + L) C. Everything else is local, and so are kept outputs: a
reused attention sends nothing.

Sizes that n does not divide are padded. Attention never sees the padding, and sees all tokens in their own order.

Source: DeepSpeed Ulysses (arXiv 2309.14509), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..adapters.finder import find
from ..broadcast.attach import Attached, attach_forward
from ..broadcast.call import Call
from ..rules import traffic
from ..rules.traffic import Sent
from .exchange import Sender, exchanged
from .layout import part, whole_output
from .token_families import STREAM, TEXT, TokenFamily

_SELF_ATTENTION = ("spatial", "temporal")
_HEADS, _TOKENS = 1, 2
"""Dimensions of the arguments of scaled dot-product attention, `[B, H, N, D]`."""


@dataclass(frozen=True)
class Segments:
    """The tokens that attention is over: of the text and of the stream, in their order.

    Args:
        lengths: tokens of each, over all ranks. A rank has a part of each, and the last ones have padding.
        ranks: their number.
    """

    lengths: tuple[int, ...] = ()
    ranks: int = 1

    @property
    def local(self) -> tuple[int, ...]:
        """Tokens of each on a rank, with padding."""
        return tuple(-(-length // self.ranks) for length in self.lengths)

    def joined(self, parts: Tensor) -> Tensor:
        """All tokens in their order, `[..., sum(lengths), C]`, from those of each rank, `[n, ..., sum(local), C]`."""
        found, start = [], 0
        for length, local in zip(self.lengths, self.local, strict=True):
            for rank in range(self.ranks):
                count = min(local, max(length - rank * local, 0))
                found.append(parts[rank].narrow(-2, start, count))
            start += local
        return torch.cat(found, -2)

    def divided(self, whole: Tensor) -> Tensor:
        """The inverse of `joined`, with zeros as padding."""
        found = []
        for rank in range(self.ranks):
            start = 0
            for length, local in zip(self.lengths, self.local, strict=True):
                first = min(rank * local, length)
                count = min(local, length - first)
                found.append(whole.narrow(-2, start + first, count))
                if count < local:
                    found.append(whole.new_zeros(*whole.shape[:-2], local - count, whole.shape[-1]))
                start += length
        return torch.cat(found, -2).unflatten(-2, (self.ranks, -1)).movedim(-3, 0)


class Tokens:
    """The layout in tokens.

    Args:
        model: of the family.
        family: of the model.
        group: of the ranks.
        input_dtype: an 8-bit dtype in which q, k and v are sent; default their own.

    Raises:
        ValueError: the model has too few heads, or parts that cannot be split.
    """

    def __init__(
        self, model: nn.Module, family: TokenFamily, group: Any, input_dtype: torch.dtype | None = None
    ) -> None:
        self._model, self._family, self._group = model, family, group
        self.input_dtype = input_dtype
        self.running = False
        """Whether a call of the model is running."""
        self.whole: dict[str, Any] = {}
        """The arguments of the call, of all ranks."""
        self.segments = Segments()
        """The tokens of the call."""
        self.mask: Tensor | None = None
        """`[B, 1, 1, N + L]`, bool: which tokens of the call may be attended to, if the text tells."""
        self._lengths = dict.fromkeys(family.order, 0)
        self._output = Sender(group, "output", "output")
        refusal = family.refusal(model)
        if getattr(model, "_parallel_config", None) is not None:
            refusal = "enable_parallelism of diffusers, which splits it already"
        if refusal is not None:
            raise ValueError(f"got a {type(model).__name__} with {refusal}; supported are models without it")
        self._attentions = {s.name: s.kind for s in find(model) if s.kind in _SELF_ATTENTION}
        n = self._output.size
        for name in self._attentions:
            heads = getattr(model.get_submodule(name), "heads", n)
            if heads % n:
                fitting = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
                raise ValueError(
                    f"got {n} ranks along the sequence, and {heads} heads in {name}; supported are ranks that divide "
                    f"the heads, here {fitting}: choose such a `sequence`, and cfg=2 for twice the ranks"
                )
        self._senders = {name: Sender(group, kind, name) for name, kind in self._attentions.items()}

    @property
    def senders(self) -> Sequence[Sender]:
        """See `Layout.senders`."""
        return [*self._senders.values(), self._output]

    def attach(self) -> Iterator[Attached]:
        """See `Layout.attach`."""
        for name, sender in self._senders.items():
            yield attach_forward(self._model.get_submodule(name), HeadsForTokens(self, sender), beneath=True)
        for name, replacement in self._family.modules.items():
            for module in _named(self._model, name):
                yield attach_forward(module, functools.partial(self._in_call, replacement), beneath=True)

    def begin(self, call: Call | None) -> None:
        """See `Layout.begin`."""

    def part_of(self, shape: Sequence[int], latents: Sequence[int]) -> tuple[int, ...]:
        """See `Layout.part_of`; one token more, as text and stream may be padded each."""
        *rows, tokens, channels = shape
        return *rows, min(tokens, traffic.part(tokens, self._output.size) + 1), channels

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """See `Layout.run`."""
        self.whole, self.mask = arguments, None
        try:
            self.running = True
            cut = {
                name: split(self, arguments[name])
                for name, split in self._family.arguments.items()
                if name in arguments
            }
            return forward(arguments | cut)
        finally:
            self.running, self.whole, self.mask = False, {}, None

    def _in_call(self, replacement: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a replacement of the family; the original outside of calls of the model."""
        return replacement(self, original, *args, **kwargs) if self.running else original(*args, **kwargs)

    def cut(self, value: Any, dim: int, of: str | None = None) -> Any:
        """This rank's part of a tensor, or of all in a pytree.

        Args:
            value: of all ranks.
            dim: the dimension of tokens.
            of: "stream" or "text" if it tells how many tokens there are of it.
        """
        if of is not None:
            self._lengths[of] = value.shape[dim]
            lengths = tuple(self._lengths.values())
            if lengths != self.segments.lengths:
                self.segments = Segments(lengths, self._output.size)
        return pytree.tree_map(lambda x: part(x, dim, self._group) if isinstance(x, Tensor) else x, value)

    def mask_text(self, text: Tensor) -> None:
        """Let attention see only some of the text.

        Args:
            text: `[B, L]`, bool.
        """
        seen = {name: text.new_ones(text.shape[0], length) for name, length in self._lengths.items()} | {TEXT: text}
        self.mask = torch.cat([seen[name] for name in self._family.order], 1)[:, None, None]

    def gather(self, out: Tensor) -> Tensor:
        """The stream `[B, N, C]` of all ranks, from this rank's part."""
        gathered: Tensor = whole_output(self._output, out, 1, self._lengths[STREAM])
        return gathered


@dataclass(eq=False)
class HeadsForTokens:
    """Replaces the `forward` of self attention: all tokens of some heads, instead of all heads of some tokens.

    Args:
        layout: with the tokens of the call.
        sender: of this attention.
    """

    layout: Tokens
    sender: Sender

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.layout.running:
            return original(*args, **kwargs)
        mode = _Intercepted(self.attend)
        with mode:
            out = original(*args, **kwargs)
        if mode.calls != 1:
            raise RuntimeError(
                f"{self.sender.name} called torch.nn.functional.scaled_dot_product_attention {mode.calls} times; "
                "attention that is split over ranks calls it once. Choose it by model.set_attention_backend('native') "
                "and without further processors, such as those of IP adapters, or call pab.unparallelize"
            )
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Replaces scaled dot-product attention.

        Args:
            query, key, value: `[B, H, local tokens, D]`; keys and values may have fewer heads.
            attn_mask: over all tokens.
            kwargs: as those of the original.

        Raises:
            ValueError: the shapes are not those of self attention, or the mask is not over all tokens.
        """
        segments, n = self.layout.segments, self.sender.size
        for x in (query, key, value):
            if x.ndim != 4 or x.shape[_TOKENS] != sum(segments.local) or x.shape[_HEADS] % n:
                raise ValueError(
                    f"{self.sender.name}: got attention over {tuple(x.shape)}; supported are [batch, heads, "
                    f"tokens, channels] with {sum(segments.local)} tokens on a rank, and a multiple of {n} heads"
                )
        if query.shape == key.shape == value.shape:
            (query, key, value), there = self._to_heads(query, key, value)
        else:
            several = [self._to_heads(x) for x in (query, key, value)]
            (query,), (key,), (value,) = (tensors for tensors, _ in several)
            there = sum((sent for _, sent in several), Sent())
        mask = None if attn_mask is None else self._mask(attn_mask, query)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **kwargs)
        out, back = self._to_tokens(out)
        self.sender.count(there + back)
        return out

    def _to_heads(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Sent]:
        """`[B, H / n, all tokens, D]` from tensors of one shape `[B, H, local tokens, D]`."""
        n, channels = self.sender.size, tensors[0].shape[-1]
        parts = [x.transpose(_HEADS, _TOKENS).unflatten(2, (n, -1)).movedim(2, 0) for x in tensors]
        together = torch.stack(parts, 1).flatten(-2)  # [n, 3, B, local tokens, H / n D]
        received, sent = exchanged(self.sender, together, self.layout.input_dtype)
        whole = self.layout.segments.joined(received)  # [3, B, all tokens, H / n D]
        return whole.unflatten(-1, (-1, channels)).transpose(2, 3).unbind(0), sent

    def _to_tokens(self, out: Tensor) -> tuple[Tensor, Sent]:
        """`[B, H, local tokens, D]` from `[B, H / n, all tokens, D]`."""
        channels = out.shape[-1]
        parts = self.layout.segments.divided(out.transpose(_HEADS, _TOKENS).flatten(-2))  # [n, B, local, H / n D]
        received, sent = exchanged(self.sender, parts)
        whole = received.movedim(0, 2).unflatten(-1, (-1, channels)).flatten(2, 3)  # [B, local, H, D]
        return whole.transpose(_HEADS, _TOKENS), sent

    def _mask(self, mask: Tensor, query: Tensor) -> Tensor:
        """The mask of all tokens and this rank's heads."""
        if self.layout.mask is not None:
            return self.layout.mask
        heads, tokens = query.shape[_HEADS], query.shape[_TOKENS]
        if mask.shape[-1] != tokens or (mask.ndim > 1 and mask.shape[-2] not in (1, tokens)):
            raise ValueError(
                f"{self.sender.name}: got a mask of shape {tuple(mask.shape)} for attention over {tokens} tokens, of "
                f"which each rank has {sum(self.layout.segments.local)}; supported are masks over all tokens: call the "
                "model without a mask, or pab.unparallelize"
            )
        if mask.ndim > 2 and mask.shape[-3] > 1:
            return mask.narrow(-3, self.sender.rank * heads, heads)
        return mask


class _Intercepted(TorchFunctionMode):
    """Calls `attend` instead of scaled dot-product attention, in this thread.

    Args:
        attend: with the same arguments.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self.attend(*args, **kwargs)
        name: str = getattr(func, "__name__", "")
        if torch.compiler.is_dynamo_compiling() and getattr(Tensor, name, None) is func:
            return getattr(args[0], name)(*args[1:], **kwargs)  # it cannot trace methods that are written in Python
        return func(*args, **kwargs)


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    """The module of that name; all entries of a list for a name that ends with `.*`."""
    if name.endswith(".*"):
        return list(model.get_submodule(name[:-2]).children())
    return [model.get_submodule(name)]
