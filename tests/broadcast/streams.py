"""Calls, slots and modules for a residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pab_kernels.broadcast.call import Call
from pab_kernels.broadcast.generation import Generation
from pab_kernels.broadcast.slots import Key, Slot
from pab_kernels.broadcast.turn import Turn
from pab_kernels.rules.config import CacheDtype, CachePoint, PABConfig
from pab_kernels.rules.plan import Sublayer

SUBLAYERS = [Sublayer(f"s{i}", "spatial", i) for i in range(12)]


def storing_call(cache_dtype: CacheDtype | None = None, cache_point: CachePoint = "pre_gate") -> Call:
    """A call at a step at which every sublayer stores."""
    config = PABConfig.from_dict(
        {"spatial": {"range": 2, "window": [0, 1]}, "cache_dtype": cache_dtype, "cache_point": cache_point}
    )
    call = Generation(config, SUBLAYERS, num_steps=2).open()
    assert call is not None
    call.prepare()
    return call


def taken(call: Call, i: int, x: Tensor) -> Turn:
    turn = call.turns.by_name[SUBLAYERS[i].name]
    assert turn.take(x) is None and turn.stores
    return turn


def kept_by(call: Call, i: int) -> Any:
    slot = call.context.arena.get(SUBLAYERS[i].name)
    return None if slot is None else slot.value


def slot_of(value: Any) -> Slot:
    return Slot(value, Key((), torch.float32, torch.device("cpu")), 0, 0)


# Modules that are plain, and others that must be called as they are


class _Halved(nn.Linear):
    def forward(self, a: Tensor) -> Tensor:
        return super().forward(a) / 2


class _Single(nn.Module):
    """Computes in float32, whatever it is given."""

    def __init__(self, k: int, c: int) -> None:
        super().__init__()
        self.inner = nn.Linear(k, c)

    def forward(self, a: Tensor) -> Tensor:
        return self.inner(a.float())


class _ChannelsOuter(nn.Linear):
    def forward(self, a: Tensor) -> Tensor:
        return super().forward(a).transpose(-1, -2).contiguous().transpose(-1, -2)


class _Negated(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return -w


class _Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class _DoubledNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, out: 3 * out)
    return module


def _pre_hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return module


def _own_forward(module: nn.Module) -> nn.Module:
    original = module.forward
    module.forward = lambda *args: original(*args) + 1
    return module


def _parametrized(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", _Negated())
    return module


LINEARS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": nn.Linear,
    "no bias": lambda k, c: nn.Linear(k, c, bias=False),
    "hooked": lambda k, c: _hooked(nn.Linear(k, c)),
    "pre-hooked": lambda k, c: _pre_hooked(nn.Linear(k, c)),
    "own forward": lambda k, c: _own_forward(nn.Linear(k, c)),
    "parametrized": lambda k, c: _parametrized(nn.Linear(k, c)),
    "subclass": _Halved,
    "sequence": lambda k, c: nn.Sequential(nn.Linear(k, c), nn.Tanh()),
    "float32 inside": _Single,
    "channels outermost": _ChannelsOuter,
}
NORMS: dict[str, Callable[[torch.Size], nn.Module]] = {
    "layer": lambda s: nn.LayerNorm(s[-1], elementwise_affine=False, eps=1e-6),
    "affine layer": lambda s: _scrambled(nn.LayerNorm(s[-1])),
    "layer without bias": lambda s: _scrambled(nn.LayerNorm(s[-1], bias=False)),
    "layer over tokens too": lambda s: nn.LayerNorm(s[-2:], elementwise_affine=False),
    "affine layer over tokens too": lambda s: _scrambled(nn.LayerNorm(s[-2:])),
    "rms": lambda s: _scrambled(nn.RMSNorm(s[-1], eps=1e-3)),
    "rms with torch's eps": lambda s: nn.RMSNorm(s[-1], elementwise_affine=False),
    "rms over tokens too": lambda s: nn.RMSNorm(s[-2:], eps=1e-6),
    "hooked": lambda s: _hooked(nn.LayerNorm(s[-1])),
    "subclass": lambda s: _DoubledNorm(s[-1]),
    "custom": lambda s: _Centred(),
    "none": lambda s: nn.Identity(),
}


def _scrambled(norm: nn.Module) -> nn.Module:
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm
