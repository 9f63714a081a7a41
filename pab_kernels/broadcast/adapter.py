"""What a family of models gives the broadcaster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..rules.plan import Sublayer

if TYPE_CHECKING:
    from .broadcaster import Broadcaster


class Detachable(Protocol):
    """Something to do to a model that can be undone."""

    def attach(self) -> Any:
        """Do it."""

    def detach(self) -> None:
        """Undo it."""


class Adapter(Protocol):
    """How one family of models is run under PAB; see `pab_kernels.adapters`."""

    @property
    def sublayers(self) -> Sequence[Sublayer]:
        """The model's sublayers."""

    @property
    def cache_points(self) -> Sequence[str]:
        """The cache points that it supports."""

    def attach(self, broadcaster: Broadcaster) -> Iterable[Detachable]:
        """What makes the model's blocks ask `broadcaster.call` what to do; the broadcaster attaches it."""
