"""Any model with modules of `pab_kernels.nn` in it: `PABAttention`, `PABCrossAttention`, or others wrapped in
`BroadcastModule`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..broadcast.adapter import Detachable
from ..broadcast.broadcaster import Broadcaster
from ..nn import BroadcastModule
from ..rules.plan import Sublayer


def handles(model: nn.Module) -> bool:
    """Whether `model` has a `BroadcastModule` in it."""
    return any(isinstance(m, BroadcastModule) for m in model.modules())


class ModulesAdapter:
    """The `BroadcastModule`s of a model.

    Attention is kept before its projection too, where every one has a projection of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: m for name, m in model.named_modules() if isinstance(m, BroadcastModule)}
        self.sublayers: Sequence[Sublayer] = [
            Sublayer(name, m.kind, m.layer, "module") for name, m in self._modules.items()
        ]

    @property
    def cache_points(self) -> Sequence[str]:
        """Where outputs are kept: before a gate that is outside of the module, or before the projection."""
        parted = all(m.projection is not None for m in self._modules.values() if m.kind != "mlp")
        return ("pre_gate", "unprojected") if parted else ("pre_gate",)

    def attach(self, broadcaster: Broadcaster) -> list[Detachable]:
        """Let the modules ask `broadcaster`."""
        return [
            m.join(broadcaster, sublayer) for m, sublayer in zip(self._modules.values(), self.sublayers, strict=True)
        ]
