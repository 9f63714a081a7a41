"""`BroadcastModule`: any attention module under a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..broadcast.outputs import broadcast_output
from ..rules.config import KINDS
from .parts import PartsModule

if TYPE_CHECKING:
    from ..broadcast.broadcaster import Broadcaster
    from ..rules.plan import Sublayer

_PREFIX = "module."


class BroadcastModule(nn.Module):
    """Wraps an attention module (or an MLP): computed as it is, or its last output given back, as the plan says.

    The output may be a tensor or any nest of tensors, and is kept whole (see `broadcast.outputs`). Where it is used as
    `x + gate * module(...)`, the gate stays outside and fresh. `state_dict` has the names of the wrapped module.
    Without `enable`, it is the wrapped module.

    Args:
        module: what is wrapped.
        kind: "spatial", "temporal", "cross" or "mlp".
        layer: index of its block, for rules restricted to some layers.

    Raises:
        ValueError: the kind is not known.
    """

    def __init__(self, module: nn.Module, kind: str, layer: int = 0) -> None:
        super().__init__()
        if kind not in KINDS or kind == "block":
            raise ValueError(f"kind {kind!r} is not known; supported are 'spatial', 'temporal', 'cross', 'mlp'")
        self.module = module
        self.kind = kind
        self.layer = layer
        self._member: Membership | None = None
        self.register_state_dict_post_hook(_strip)
        self.register_load_state_dict_pre_hook(_restore)

    def join(self, broadcaster: Broadcaster, sublayer: Sublayer) -> Membership:
        """The tie to `broadcaster`, which holds from its `attach` to its `detach`."""
        return Membership(self, broadcaster, sublayer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, computed or broadcast."""
        member = self._member
        turn = (
            None if member is None or member.module is not self else member.current.turn
        )  # a shallow copy has the member too
        if turn is None or not turn.open or turn.passes():
            return self.module(*args, **kwargs)
        if turn.unprojected and isinstance(self.module, PartsModule):
            return self.module(*args, turn=turn, **kwargs)
        return broadcast_output(turn, self.module, args, kwargs)

    @property
    def projection(self) -> nn.Module | None:
        """What comes after what is kept with `cache_point="unprojected"`."""
        return self.module.projection if isinstance(self.module, PartsModule) else None


class Membership:
    """A module's tie to the broadcaster of the model that it is in."""

    def __init__(self, module: BroadcastModule, broadcaster: Broadcaster, sublayer: Sublayer) -> None:
        self.module = module
        self.broadcaster = broadcaster
        self.sublayer = sublayer
        self.current = broadcaster.current(sublayer.name)

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copy of the model is a plain model

    def attach(self) -> None:
        """Run under the broadcaster."""
        self.module._member = self

    def detach(self) -> None:
        """Be the wrapped module again."""
        if self.module._member is self:
            self.module._member = None


def _strip(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, prefix + _PREFIX, prefix)


def _restore(module: nn.Module, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(state, dict)
    _rename(state, prefix, prefix + _PREFIX)


def _rename(state: dict[str, Any], prefix: str, other: str) -> None:
    """Names that start with `prefix` start with `other` instead.

    All are taken out first, as the wrapped module may have a `module` too.
    """
    state.update(
        [(other + name[len(prefix) :], state.pop(name)) for name in [n for n in state if n.startswith(prefix)]]
    )
