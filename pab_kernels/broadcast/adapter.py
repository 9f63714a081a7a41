"""The interface between a family of models and the broadcaster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..rules.plan import Sublayer

if TYPE_CHECKING:
    from .broadcaster import Broadcaster


class Detachable(Protocol):
    """A change to a model that can be undone."""

    def attach(self) -> Any:
        """Make the change."""

    def detach(self) -> None:
        """Undo the change."""


class Adapter(Protocol):
    """How one family of models is run under PAB; see `pab_kernels.adapters`."""

    @property
    def sublayers(self) -> Sequence[Sublayer]:
        """The model's sublayers."""

    @property
    def cache_points(self) -> Sequence[str]:
        """The cache points that this family supports."""

    def attach(self, broadcaster: Broadcaster) -> Iterable[Detachable]:
        """Yield the stand-ins that make the blocks follow the broadcaster's turns; the broadcaster attaches them."""
