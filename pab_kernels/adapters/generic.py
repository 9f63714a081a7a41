"""The generic adapter, for any DiT: it finds the sublayers, and each module runs unchanged or its output is reused."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..broadcast.attach import Attached, attach_forward
from ..broadcast.broadcaster import Broadcaster
from ..broadcast.outputs import BroadcastForward, broadcast_change, broadcast_output
from ..rules.plan import Sublayer
from .finder import find


class GenericAdapter:
    """Replaces the `forward` of each module found by `find`.

    A reused attention or MLP returns its kept output, before any gate outside of it; a reused block adds the change
    that it made.

    Args:
        model: any module.
        kinds: see `find`.

    Raises:
        TypeError: the model has no recognisable sublayers.
        ValueError: `kinds` does not suit the model.
    """

    def __init__(self, model: nn.Module, kinds: Mapping[str, str | None] | None = None) -> None:
        found = find(model, kinds)
        if not found:
            raise TypeError(
                f"{type(model).__name__}: no attention was found, neither by projections of queries nor by name; name "
                "its modules: enable(model, kinds={'blocks.*.attn': 'spatial'}), or wrap them in "
                "pab_kernels.nn.BroadcastModule"
            )
        modules = dict(model.named_modules())
        self.found = [(s, modules[s.name]) for s in found]
        around = {s.name: modules.get(s.name.rpartition(".")[0], model) for s in found}
        self._bypassed = [s.name for s in found if s.kind != "block" and _has_fast_path(around[s.name])]

    @property
    def cache_points(self) -> Sequence[str]:
        """Only "pre_gate", as a module's output is kept as it is returned."""
        return ("pre_gate",)

    @property
    def sublayers(self) -> Sequence[Sublayer]:
        """The sublayers that `find` found."""
        return [sublayer for sublayer, _ in self.found]

    def attach(self, broadcaster: Broadcaster, names: Collection[str]) -> Iterator[tuple[str, Attached]]:
        """Yield stand-ins for the `forward` of modules.

        Raises:
            ValueError: torch's fast path would bypass one of them.
        """
        if self._bypassed and torch.backends.mha.get_fastpath_enabled():
            raise ValueError(
                f"{self._bypassed[0]} is in an nn.TransformerEncoderLayer, which runs as one operation of torch and "
                "does not call it; call torch.backends.mha.set_fastpath_enabled(False) first, or leave it out and use "
                "a rule for blocks: "
                f"enable(model, kinds={{{re.sub(r'[.]([0-9]+)[.]', '.*.', self._bypassed[0])!r}: None}})"
            )
        for sublayer, module in self.found:
            if sublayer.name in names:
                kinds = {s.kind for s, _ in self.found if s.block == sublayer.name} or {sublayer.kind}
                stand_in = self.stand_in(broadcaster, sublayer)
                yield sublayer.name, attach_forward(module, stand_in, role=", ".join(sorted(kinds)))

    def stand_in(self, broadcaster: Broadcaster, sublayer: Sublayer) -> Callable[..., Any]:
        """The replacement of a module's `forward`."""
        return BroadcastForward(
            broadcaster.current(sublayer.name), broadcast_change if sublayer.kind == "block" else broadcast_output
        )


def _has_fast_path(module: nn.Module) -> bool:
    """Whether torch may run a module in its fast path, without calling the attention inside."""
    return (
        isinstance(module, nn.TransformerEncoderLayer)
        and type(module).forward is nn.TransformerEncoderLayer.forward
        and module.self_attn.batch_first
    )
