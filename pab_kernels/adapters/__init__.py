"""Adapters: how the blocks of a family of models become chains of sublayers. One file a family."""

from __future__ import annotations

from torch import nn

from ..broadcast.broadcaster import Adapter


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's family.

    Raises:
        TypeError: there is none.
    """
    from . import latte, modules

    if latte.handles(model):
        return latte.LatteAdapter(model)
    if modules.handles(model):
        return modules.ModulesAdapter(model)
    raise TypeError(
        f"{type(model).__name__} has no adapter; supported are LatteTransformer3DModel and models whose attention modules are those of "
        "pab_kernels.nn: PABAttention, PABCrossAttention, or any other wrapped in BroadcastModule"
    )
