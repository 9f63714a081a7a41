"""The parts of an attention module, projections, norms and output, by their names in its `state_dict`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..broadcast.fusing import is_original
from ..broadcast.outputs import broadcast_unprojected
from ..broadcast.turn import Turn
from ..ops.attention.options import MAX_HEAD_DIM, MIN_HEAD_DIM
from ..ops.quantized import Quantized


@dataclass(frozen=True)
class Layer:
    """A child module that projects: an `nn.Linear` or its replacement.

    Args:
        name: of the child.
        count: how many of q, k and v it computes, side by side.
    """

    name: str
    count: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the children and parameters of the module that it uses."""
        return (self.name,)

    def project(self, owner: nn.Module, x: Tensor) -> Tensor:
        """`[..., count * H * D]`."""
        return owner.get_submodule(self.name)(x)

    def weights(self, owner: nn.Module) -> list[Tensor] | None:
        """The parameters that decide its outputs; None if other things do too, such as the scale of a LoRA."""
        layer: Any = owner.get_submodule(self.name)
        if type(layer) is not nn.Linear or "forward" in vars(layer) or not is_original(nn.Linear, "forward"):
            return None
        return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]

    def hooks(self, owner: nn.Module) -> tuple[int, ...]:
        """The ids of its hooks, which differ for any two hooks."""
        layer = owner.get_submodule(self.name)
        return (*layer._forward_pre_hooks, *layer._forward_hooks)


@dataclass(frozen=True)
class Rows:
    """Rows of parameters that project, as `nn.MultiheadAttention` has them.

    Args:
        weight, bias: names of the parameters; the bias may be None in the module.
        weight_rows, bias_rows: the first row and the end.
        count: as in `Layer`.
    """

    weight: str
    bias: str
    weight_rows: tuple[int, int]
    bias_rows: tuple[int, int]
    count: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the children and parameters of the module that it uses."""
        return (self.weight, self.bias)

    def project(self, owner: nn.Module, x: Tensor) -> Tensor:
        """`[..., count * H * D]`."""
        weight, bias = getattr(owner, self.weight), getattr(owner, self.bias)
        return F.linear(x, weight[slice(*self.weight_rows)], None if bias is None else bias[slice(*self.bias_rows)])

    def weights(self, owner: nn.Module) -> list[Tensor]:
        """The parameters that decide its outputs."""
        return [p for p in (getattr(owner, self.weight), getattr(owner, self.bias)) if p is not None]

    def hooks(self, owner: nn.Module) -> tuple[int, ...]:
        """Ids of hooks: parameters have none."""
        return ()


@dataclass(frozen=True)
class Parts:
    """The parts of an attention module.

    Args:
        channels, text_channels: C of the inputs.
        heads, head_dim: H and D.
        projections: of q, k and v, that of q first.
        out: names of the modules that run on the attention's output, in order.
        q_norm, k_norm: names of the norms, or None.
        softmax_scale: None for D ** -0.5.
        dropout: of the attention probabilities in training.
    """

    channels: int
    text_channels: int
    heads: int
    head_dim: int
    projections: tuple[Layer | Rows, ...]
    out: tuple[str, ...]
    q_norm: str | None = None
    k_norm: str | None = None
    softmax_scale: float | None = None
    dropout: float = 0.0

    @property
    def roots(self) -> set[str]:
        """Names of the module's own children and parameters among the parts."""
        names = (*(name for p in self.projections for name in p.names), self.q_norm, self.k_norm, *self.out)
        return {name.partition(".")[0] for name in names if name is not None}


class PartsModule(nn.Module):
    """An attention module made of the parts of another: the same objects under the same names.

    Args:
        source: the other module.
        parts: its parts.

    Raises:
        ValueError: the head dimension is not supported.
    """

    def __init__(self, source: nn.Module, parts: Parts) -> None:
        super().__init__()
        if not MIN_HEAD_DIM <= parts.head_dim <= MAX_HEAD_DIM:
            supported = f"heads of {MIN_HEAD_DIM} to {MAX_HEAD_DIM} channels are supported"
            raise ValueError(
                f"got {parts.heads} heads of {parts.head_dim} channels; {supported}: wrap the module in BroadcastModule"
            )
        self.parts = parts
        roots = parts.roots
        for name, parameter in source._parameters.items():  # in the order of the source
            if name in roots:
                self.register_parameter(name, parameter)
        for name, child in source._modules.items():
            if name in roots:
                self.add_module(name, child)
        self.training = source.training

    def extra_repr(self) -> str:
        """Heads and head dimension, for `repr`."""
        return f"heads={self.parts.heads}, head_dim={self.parts.head_dim}"

    def project(self, projections: Iterable[Layer | Rows], x: Tensor) -> list[Tensor]:
        """The projections of `x [..., C]`: views `[..., H, D]`."""
        parts = self.parts
        if self.training and parts.dropout:
            given = f"attention dropout {parts.dropout} is active"
            raise RuntimeError(f"{given}; inference without dropout is supported: call .eval() on the model")
        heads = (parts.heads, parts.head_dim)
        return [t for p in projections for t in p.project(self, x).unflatten(-1, (p.count, *heads)).unbind(-3)]

    def norm(self, name: str | None) -> nn.Module | None:
        """The norm of this name."""
        return None if name is None else self.get_submodule(name)

    def forward(self, x: Tensor, *args: Any, turn: Turn | None = None, **kwargs: Any) -> Tensor:
        """Attention, projected; a `turn` decides whether attention is computed or read from its slot."""
        if turn is not None:
            return broadcast_unprojected(turn, self, x, args, kwargs)
        return self.finish(self.attend(x, *args, **kwargs)[0], x)

    def attend(
        self, x: Tensor, *args: Any, store: Turn | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | Quantized | None]:
        """Attention `[..., H, D]` before its projection, and its copy for the turn `store`, with a scale a head."""
        raise NotImplementedError

    def arrange(self, out: Tensor, x: Tensor) -> Tensor:
        """Attention `[..., H, D]` rearranged to the order of x's tokens."""
        raise NotImplementedError

    @property
    def projection(self) -> nn.Module | None:
        """The first module of the output projection."""
        return self.get_submodule(self.parts.out[0]) if self.parts.out else None

    @property
    def head_dim(self) -> int:
        """Channels of a head, which share a scale where attention before its projection is kept in 8 bits."""
        return self.parts.head_dim

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """Attention projected to `[..., C]`, in the order of x's tokens."""
        y = self.arrange(out, x).flatten(-2)
        for name in self.parts.out:
            y = self.get_submodule(name)(y)
        return y


Widths = dict[str, tuple[int, int]]
"""By name of a projection, its channels in and out."""


def fresh(
    channels: int,
    heads: int,
    widths: dict[str, tuple[int, int]],
    bias: bool,
    qk_norm: str | None,
    eps: float,
    **made: Any,
) -> nn.Module:
    """A module of new parts under the names that timm gives them.

    Args:
        channels, heads: C and H.
        widths: of the projections.
        bias: whether the projections have biases.
        qk_norm: None, "rms", "layer" or "rms_across_heads".
        eps: of the norms.
        made: device and dtype.
    """
    if heads < 1 or channels % heads:
        raise ValueError(
            f"got {channels} channels and {heads} heads; heads that divide the channels are supported: change either"
        )
    source = nn.Module()
    source.num_heads = heads  # type: ignore[assignment]
    for name, (inside, outside) in widths.items():
        source.add_module(name, nn.Linear(inside, outside, bias=bias, **made))
    source.add_module("proj", nn.Linear(channels, channels, **made))
    norms = {
        "rms": lambda: nn.RMSNorm(channels // heads, eps, **made),
        "layer": lambda: nn.LayerNorm(channels // heads, eps, **made),
        "rms_across_heads": lambda: nn.RMSNorm(channels, eps, **made),
    }
    if qk_norm is not None:
        if qk_norm not in norms:
            raise ValueError(
                f"got qk_norm {qk_norm!r}; None, {', '.join(map(repr, norms))} are supported: pass one of these"
            )
        for name in ("q_norm", "k_norm"):
            source.add_module(name, norms[qk_norm]())
    return source


def check_input(name: str, x: Any, shape: str, dims: tuple[int, ...], channels: int) -> None:
    """Raise unless `x` is a tensor with this many dimensions and channels."""
    if not isinstance(x, torch.Tensor) or x.ndim not in dims or x.shape[-1] != channels:
        given = f"has shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"is a {type(x).__name__}"
        raise ValueError(f"{name} {given}; {shape} with {channels} channels is supported: reshape it")


def refuse_options(options: dict[str, Any], supported: str) -> None:
    """Raise unless all options, arguments of other attention modules, are None."""
    given = ", ".join(name for name, value in options.items() if value is not None)
    if given:
        advice = "leave it out, or wrap the original module in BroadcastModule"
        raise TypeError(f"got {given}; {supported} are supported: {advice}")


def stored_dtype(q: Tensor, store: Turn | None) -> torch.dtype | None:
    """The dtype of the slot of a turn; None if it stores nothing."""
    return None if store is None else store.dtype or q.dtype
