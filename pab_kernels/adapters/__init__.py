"""Adapters: how the blocks of a model become chains of sublayers. One file a family, and one for all others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..broadcast.adapter import Adapter


def adapter_for(model: nn.Module, kinds: Mapping[str, str | None] | None = None) -> Adapter:
    """The adapter of a model: its modules of `pab_kernels.nn` where it has such, else its family's, else the generic
    one.

    Args:
        model: the DiT.
        kinds: what modules are to be taken for (see `finder.find`); the generic adapter then serves every family.

    Raises:
        TypeError: no sublayers are found in the model.
        ValueError: `kinds` does not suit the model.
    """
    from . import generic, latte, modules

    if modules.handles(model):
        if kinds:
            raise ValueError(
                f"kinds={dict(kinds)}: this {type(model).__name__} has modules of pab_kernels.nn, and their kinds are "
                "their own"
            )
        return modules.ModulesAdapter(model)
    if latte.handles(model) and not kinds:
        return latte.LatteAdapter(model)
    return generic.GenericAdapter(model, kinds)
