"""The interface between a family of models and the broadcaster."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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

    def attach(self, broadcaster: Broadcaster, names: Collection[str]) -> Iterable[tuple[str, Detachable]]:
        """Yield the stand-ins that make sublayers follow the broadcaster's turns; the broadcaster attaches them.

        Args:
            broadcaster: of the model.
            names: of the sublayers that have turns.

        Yields:
            The name of a sublayer, and its stand-in.
        """
