"""Adapters, which turn the blocks of a model into chains of sublayers: one file a family, and one for all others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..broadcast.adapter import Adapter


def adapter_for(model: nn.Module, kinds: Mapping[str, str | None] | None = None) -> Adapter:
    """Choose the adapter of a model.

    A model with modules of `pab_kernels.nn` gets the `ModulesAdapter`; any other one the adapter of its family, or the
    generic one.

    Args:
        model: the DiT.
        kinds: corrects misclassified modules, see `finder.find`; with it, the generic adapter serves every family.

    Returns:
        The adapter.

    Raises:
        TypeError: the model has no recognisable sublayers.
        ValueError: `kinds` does not suit the model.
    """
    from . import allegro, generic, latte, modules, stdit3

    if modules.handles(model):
        if kinds:
            raise ValueError(
                f"got kinds={dict(kinds)}; not supported for this {type(model).__name__}, as its modules of "
                "pab_kernels.nn define their kinds: leave kinds out"
            )
        return modules.ModulesAdapter(model)
    if latte.handles(model) and not kinds:
        return latte.LatteAdapter(model)
    if allegro.handles(model) and not kinds:
        return allegro.AllegroAdapter(model)
    if stdit3.handles(model) and not kinds:
        return stdit3.STDiT3Adapter(model)
    return generic.GenericAdapter(model, kinds)
