"""What the cases of `attention` and `short_attention` share: inputs, a user's code around any attention kernel, and its
candidates.

q, k and v lie packed, as the projection leaves them, and the output is wanted token by token, as the next projection
reads it. What a user pays beside the kernel (norms, rotary embedding, copies that rearrange) is part of every
candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels import ops
from pab_kernels.ops import QKNorm, Rope, attention_flops, quantize

from .candidates import backends, compiled, eager, plain_torch
from .case import Candidate, Case, Draw, Inputs, Outputs, Run, Unavailable, doubled, floats
from .exact_attention import checked_queries, exact_attention
from .geometries import Geometry

Kernel = Callable[[Tensor, Tensor, Tensor, Inputs], Tensor]
"""Attention of q, k, v `[batch, H, N, D]`; the inputs hold what else it may want."""

EPS = 1e-6


@dataclass(frozen=True)
class Attention:
    """One attention of a model.

    Args:
        op: the operation that serves it.
        kind: "spatial" (also over all frames at once), "temporal" or "cross".
        store: the 8-bit dtype in which the output is kept too, or None.
    """

    op: str
    kind: Literal["spatial", "temporal", "cross"]
    geometry: Geometry
    store: torch.dtype | None = None

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """The batch dimensions of q."""
        g = self.geometry
        if self.kind == "cross" or not g.factorised:
            return (g.batch,)
        return (g.batch, g.frames) if self.kind == "spatial" else (g.batch, g.tokens)

    @cached_property
    def queries(self) -> int:
        """Tokens of a sequence."""
        g = self.geometry
        return (
            g.frames
            if self.kind == "temporal"
            else g.tokens + g.joint
            if self.kind == "spatial"
            else g.frames * g.tokens
        )

    @cached_property
    def keys(self) -> int:
        """Keys of a sequence."""
        return self.geometry.text if self.kind == "cross" else self.queries

    @cached_property
    def norm(self) -> Literal["rms", "layer", "across"] | None:
        """How q and k are normed; in cross attention these models do not."""
        return None if self.kind == "cross" else self.geometry.norm

    @cached_property
    def rope(self) -> str | None:
        """The pairs that are rotated."""
        return self.geometry.rope if self.kind == self.geometry.rope_kind else None

    @cached_property
    def lengths(self) -> list[int] | None:
        """Keys of each clip that are not padding, in cross attention: the first has all, the last about half."""
        if self.kind != "cross":
            return None
        g = self.geometry
        return [g.text - i * (g.text // 2) // max(1, g.batch - 1) for i in range(g.batch)]

    @property
    def flops(self) -> int:
        """Without the keys that are padding."""
        sequences = [self.keys] * torch.Size(self.batch).numel() if self.lengths is None else self.lengths
        return sum(
            attention_flops(1, self.geometry.heads, self.queries, keys, self.geometry.head_dim) for keys in sequences
        )


def case(name: str, title: str, attention: Attention, dtype: torch.dtype) -> Case:
    """The case of this attention."""
    g = attention.geometry
    shape = {"batch": torch.Size(attention.batch).numel(), "queries": attention.queries, "keys": attention.keys}
    looked_at = partial(_looked_at, attention)
    sdpa = partial(plain, attention, _sdpa)
    return Case(
        attention.op,
        name,
        title,
        {**shape, "heads": g.heads, "head_dim": g.head_dim},
        dtype,
        attention.flops,
        partial(_draw, attention),
        sdpa,
        partial(_exact, attention),
        looked_at,
        (*backends(attention.op, partial(_call, attention)), *plain_torch(sdpa), *_kernels(attention)),
    )


def _draw(attention: Attention, draw: Draw) -> Inputs:
    g = attention.geometry
    heads = (g.heads, g.head_dim)
    inputs: Inputs = {}
    if attention.kind == "cross":
        inputs["q"] = draw(*attention.batch, attention.queries, *heads)
        inputs["kv"] = draw(*attention.batch, attention.keys, 2, *heads)
        inputs["lengths"] = torch.tensor(attention.lengths, device=draw.device)
        keys = torch.arange(attention.keys, device=draw.device)
        inputs["mask"] = (keys < inputs["lengths"][:, None])[:, None, None]  # [B, 1, 1, M]
    else:
        tokens = (g.frames, g.tokens) if g.factorised else (attention.queries,)
        inputs["qkv"] = draw(g.batch, *tokens, 3, *heads)
    if attention.norm:
        weight = heads if attention.norm == "across" else heads[1:]
        inputs["q_weight"], inputs["k_weight"] = 1 + draw(*weight) / 4, 1 + draw(*weight) / 4
    if attention.rope:
        angles = draw(attention.queries, g.head_dim // 2, dtype=torch.float32)
        inputs["cos"], inputs["sin"] = angles.cos(), angles.sin()
    return inputs


def views(attention: Attention, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q `[*batch, N, H, D]`, k and v `[*batch, M, H, D]`, where they lie."""
    if attention.kind == "cross":
        return inputs["q"], inputs["kv"].select(-3, 0), inputs["kv"].select(-3, 1)
    q, k, v = (inputs["qkv"].select(-3, i) for i in range(3))
    if attention.kind == "temporal":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return q, k, v


def normed(t: Tensor, weight: Tensor, kind: str) -> Tensor:
    """The norm of q or k as a user writes it."""
    if kind == "across":
        return F.rms_norm(t.flatten(-2), weight.flatten().shape, weight.flatten(), EPS).unflatten(-1, weight.shape)
    return (
        F.rms_norm(t, weight.shape, weight, EPS) if kind == "rms" else F.layer_norm(t, weight.shape, weight, None, EPS)
    )


def rotated(t: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """The rotary embedding as a user writes it, `[*batch, N, H, D]`."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if pairs == "interleaved" else wide.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, D / 2]
    pair = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(pair, -1).flatten(-2) if pairs == "interleaved" else torch.cat(pair, -1)).to(t.dtype)


def prepared(attention: Attention, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q and k with norm and rotation, and v."""
    q, k, v = views(attention, inputs)
    if attention.norm:
        q, k = normed(q, inputs["q_weight"], attention.norm), normed(k, inputs["k_weight"], attention.norm)
    if attention.rope:
        q, k = (rotated(t, inputs["cos"], inputs["sin"], attention.rope) for t in (q, k))
    return q, k, v


def plain(attention: Attention, kernel: Kernel, inputs: Inputs) -> Outputs:
    """The code of a user: norms, rotation, one batch dimension, heads first, the kernel, and back."""
    q, k, v = heads_first(attention, inputs)
    return finished(attention, kernel(q, k, v, inputs))


def heads_first(attention: Attention, inputs: Inputs) -> list[Tensor]:
    """q, k and v as a kernel takes them, `[batch, H, N, D]`."""
    return [t.flatten(0, -4).transpose(1, 2) for t in prepared(attention, inputs)]


def finished(attention: Attention, out: Tensor) -> Outputs:
    """What a kernel gives, `[batch, H, N, D]`, as it is wanted."""
    out = out.transpose(1, 2).unflatten(0, attention.batch)  # [*batch, N, H, D]
    if attention.kind == "temporal":  # [B, T, S, H, D] in memory
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    out = out if attention.kind == "temporal" else out.contiguous()
    if attention.store is None:
        return out, None
    return out, quantize(out, attention.store, group=out.shape[-1])


def _exact(attention: Attention, inputs: Inputs) -> tuple[Tensor, ...]:
    q, k, v = (t.flatten(0, -4) for t in prepared(attention, doubled(inputs)))
    out = exact_attention(q[:, _checked(attention).to(q.device)], k, v, inputs.get("lengths"))
    return (out,) if attention.store is None else (out, out)


def _looked_at(attention: Attention, outputs: Outputs) -> tuple[Tensor, ...]:
    results = [floats(t).flatten(0, -4) for t in outputs if t is not None]
    return tuple(t[:, _checked(attention).to(t.device)] for t in results)


def _checked(attention: Attention) -> Tensor:
    return checked_queries(attention.queries, attention.keys, attention.geometry.heads)


def _call(attention: Attention, backend: str, inputs: Inputs) -> Outputs:
    q, k, v = views(attention, inputs)
    norms = _qk_norms(attention, q, k, inputs)
    rope = Rope(inputs["cos"], inputs["sin"], attention.rope == "interleaved") if attention.rope else None
    options: dict[str, Any] = {"q_norm": norms[0], "k_norm": norms[1], "rope": rope, "backend": backend}
    options["store_dtype"] = attention.store
    if attention.op == "attention":
        return ops.attention(q, k, v, key_lengths=inputs.get("lengths"), **options)
    return ops.short_attention(q, k, v, **options)


def _qk_norms(attention: Attention, q: Tensor, k: Tensor, inputs: Inputs) -> Sequence[QKNorm | None]:
    if attention.norm is None:
        return None, None
    weights = inputs["q_weight"], inputs["k_weight"]
    if attention.norm != "across":
        return [QKNorm(attention.norm, weight, eps=EPS) for weight in weights]
    roots = [(t.float().square().mean((-2, -1)) + EPS).rsqrt() for t in (q, k)]  # [*batch, N]
    return [QKNorm("rms", weight, rstd=root) for weight, root in zip(weights, roots, strict=True)]


def _kernels(attention: Attention) -> list[Candidate]:
    """A candidate for each attention kernel that a user can have, eager, and compiled where there is more than the
    kernel."""
    found = []
    for title, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        code = partial(plain, attention, partial(_sdpa, backend=backend))
        found.append(eager(code, f"SDPA {title}"))
        if attention.norm or attention.rope or attention.kind == "temporal":
            found.append(compiled(code, f"SDPA {title}, compiled"))
    found += [
        _flash_attn(attention, "flash-attn 2", "flash_attn"),
        _flash_attn(attention, "flash-attn 3", "flash_attn_interface"),
    ]
    return [*found, _flex(attention)]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, backend: SDPBackend | None = None) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.get("mask"))
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.get("mask"))


def _flash_attn(attention: Attention, name: str, module: str) -> Candidate:
    def make() -> Run:
        try:
            function = import_module(module).flash_attn_func
        except ImportError as error:
            raise Unavailable(f"{module} is not installed: {error}") from None
        if attention.lengths is not None:
            raise Unavailable("key lengths need packed keys, which the host would have to wait for")

        def kernel(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
            out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [batch, N, H, D]
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return partial(plain, attention, kernel)

    return Candidate(name, make)


def _flex(attention: Attention) -> Candidate:
    """FlexAttention compiled, and what comes before it compiled apart: inductor cannot lower it where its inputs are
    views in its graph."""

    def make() -> Run:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        before = torch.compile(partial(heads_first, attention), dynamic=False, fullgraph=True)

        def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
            if lengths is None:
                return flex_attention(q, k, v)

            def masked(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return torch.where(key < lengths[batch], score, -torch.inf)

            return flex_attention(q, k, v, score_mod=masked)

        flex = torch.compile(attend, dynamic=False, fullgraph=True)

        def run(inputs: Inputs) -> Outputs:
            q, k, v = before(inputs)
            return finished(attention, flex(q, k, v, inputs.get("lengths")))

        return run

    return Candidate("FlexAttention", make)
