"""What the tests of `PABAttention` and `PABCrossAttention` compare with: attention by its definition, and modules as
timm writes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention of `[B, N, H, D]` to `[B, M, H, D]`, the first `lengths` of M."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if lengths is not None:
        scores = scores.masked_fill(torch.arange(k.shape[1]) >= lengths[:, None, None, None], -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def turned(x: Tensor, theta: float, interleaved: bool) -> Tensor:
    """Rotary embedding of `[B, N, H, D]` by complex numbers."""
    channels = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(0, channels, 2).double() / channels)
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    pairs = torch.view_as_complex(pairs.double().contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    real = torch.view_as_real(pairs)
    return (real.flatten(-2) if interleaved else real.transpose(-1, -2).flatten(-2)).to(x.dtype)


class TimmAttention(nn.Module):
    """Self attention after timm's `Attention`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bias: bool = True,
        norm: Any = nn.Identity,
        fused: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(rows, tokens, channels)))


class TimmCrossAttention(nn.Module):
    """Attention to the text after timm's and Open-Sora's: a projection of q and a packed one of k and v, under either's
    names."""

    def __init__(
        self, dim: int, num_heads: int, text: int, suffix: str = "", bias: bool = True, norm: Any = nn.Identity
    ) -> None:
        super().__init__()
        self.num_heads, self.suffix = num_heads, suffix
        self.add_module(f"q{suffix}", nn.Linear(dim, dim, bias=bias))
        self.add_module(f"kv{suffix}", nn.Linear(text, 2 * dim, bias=bias))
        self.q_norm, self.k_norm = norm(dim // num_heads), norm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        rows, tokens, channels = x.shape
        q = self.get_submodule(f"q{self.suffix}")(x).view(rows, tokens, self.num_heads, -1).transpose(1, 2)
        kv = self.get_submodule(f"kv{self.suffix}")(text).view(rows, text.shape[1], 2, self.num_heads, -1)
        k, v = (t.transpose(1, 2) for t in kv.unbind(2))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, channels))


def randomised(module: Any, mean: float = 0.0) -> Any:
    """With every parameter random, norms and biases too, as zeros and ones hide mistakes; for inference."""
    for p in module.parameters():
        nn.init.normal_(p, mean, 0.2 if p.ndim > 1 else 0.5)
    return module.eval().requires_grad_(False)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """But for float32's rounding: where norms run on another memory layout, matrix products sum in another order."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bound = (1e-12 if expected.dtype == torch.float64 else 2e-6) * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= bound


def assert_shares(made: nn.Module, source: nn.Module) -> None:
    """Same parameters, same names, and checkpoints go both ways."""
    theirs = dict(source.named_parameters())
    assert list(made.state_dict()) == list(source.state_dict())
    assert {id(p) for p in made.parameters()} == {id(p) for p in theirs.values()}
    state = {name: torch.randn_like(value) for name, value in source.state_dict().items()}
    made.load_state_dict(state, strict=True)
    for name, value in state.items():
        assert torch.equal(theirs[name], value), name
    source.load_state_dict(made.state_dict(), strict=True)
