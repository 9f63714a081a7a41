"""The adapter of models that contain modules of `pab_kernels.nn`, or modules wrapped in `BroadcastModule`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from ..broadcast.adapter import Detachable
from ..broadcast.broadcaster import Broadcaster
from ..nn import BroadcastModule
from ..rules.plan import Sublayer


def handles(model: nn.Module) -> bool:
    """Whether `model` contains a `BroadcastModule`."""
    return any(isinstance(m, BroadcastModule) for m in model.modules())


class ModulesAdapter:
    """Runs the `BroadcastModule`s of a model.

    Args:
        model: a model that `handles` accepts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: m for name, m in model.named_modules() if isinstance(m, BroadcastModule)}
        self.sublayers: Sequence[Sublayer] = [
            Sublayer(name, m.kind, m.layer, "nn") for name, m in self._modules.items()
        ]

    @property
    def cache_points(self) -> Sequence[str]:
        """The default "pre_gate"; also "unprojected" if each attention has its own output projection."""
        separate = all(m.projection is not None for m in self._modules.values() if m.kind != "mlp")
        return ("pre_gate", "unprojected") if separate else ("pre_gate",)

    def attach(self, broadcaster: Broadcaster, names: Collection[str]) -> Iterator[tuple[str, Detachable]]:
        """Yield the memberships of modules in `broadcaster`."""
        for sublayer in self.sublayers:
            if sublayer.name in names:
                yield sublayer.name, self._modules[sublayer.name].join(broadcaster, sublayer)
