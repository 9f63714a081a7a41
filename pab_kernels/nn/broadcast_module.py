"""`BroadcastModule`: any module whose output a plan broadcasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..broadcast.outputs import broadcast_output
from ..rules.config import MODULE_KINDS
from .parts import PartsModule

if TYPE_CHECKING:
    from ..broadcast.broadcaster import Broadcaster
    from ..rules.plan import Sublayer

_PREFIX = "module."


class BroadcastModule(nn.Module):
    """Wraps an attention module or an MLP, which a plan computes or broadcasts.

    The output may be a tensor or any nest of tensors, and is kept whole (see `broadcast.outputs`). In
    `x + gate * module(...)` the gate is applied at every step. `state_dict` has the names of the wrapped module.
    Without `enable`, calls go straight to the wrapped module.

    Args:
        module: to wrap.
        kind: "spatial", "temporal", "cross" or "mlp".
        layer: index of its block, for rules restricted to some layers.

    Raises:
        ValueError: the kind is not supported.

    Example:
        >>> attention = BroadcastModule(nn.Linear(8, 8), "spatial", layer=3)
        >>> list(attention.state_dict())
        ['weight', 'bias']
    """

    def __init__(self, module: nn.Module, kind: str, layer: int = 0) -> None:
        super().__init__()
        if kind not in MODULE_KINDS or kind == "block":
            supported = "'spatial', 'temporal', 'cross' and 'mlp' are supported"
            raise ValueError(f"got kind {kind!r}; {supported}: pass one of these")
        self.module = module
        self.kind = kind
        self.layer = layer
        self._member: Membership | None = None
        self.register_state_dict_post_hook(_strip)
        self.register_load_state_dict_pre_hook(_restore)

    def join(self, broadcaster: Broadcaster, sublayer: Sublayer) -> Membership:
        """The membership in `broadcaster`, from its `attach` to its `detach`."""
        return Membership(self, broadcaster, sublayer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, computed or broadcast."""
        member = self._member
        # A shallow copy has the member too.
        turn = None if member is None or member.module is not self else member.current.turn
        if turn is None or turn.call is None:
            return self.module(*args, **kwargs)
        if turn.unprojected and isinstance(self.module, PartsModule):
            return self.module(*args, turn=turn, **kwargs)
        return broadcast_output(turn, self.module, args, kwargs)

    @property
    def projection(self) -> nn.Module | None:
        """The module that runs on slots of `cache_point="unprojected"`."""
        return self.module.projection if isinstance(self.module, PartsModule) else None


class Membership:
    """A module's membership in the broadcaster of its model."""

    def __init__(self, module: BroadcastModule, broadcaster: Broadcaster, sublayer: Sublayer) -> None:
        self.module = module
        self.broadcaster = broadcaster
        self.sublayer = sublayer
        self.current = broadcaster.current(sublayer.name)

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copy of the model is a plain model

    def attach(self) -> None:
        """Follow the broadcaster."""
        self.module._member = self

    def detach(self) -> None:
        """Go back to calling the wrapped module."""
        if self.module._member is self:
            self.module._member = None


def _strip(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, prefix + _PREFIX, prefix)


def _restore(module: nn.Module, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(state, dict)
    _rename(state, prefix, prefix + _PREFIX)


def _rename(state: dict[str, Any], prefix: str, other: str) -> None:
    """Replace `prefix` by `other`, in all names at once: the wrapped module may itself have a child `module`."""
    names = [name for name in state if name.startswith(prefix)]
    state.update([(other + name[len(prefix) :], state.pop(name)) for name in names])
