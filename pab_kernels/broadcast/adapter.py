"""What a family of models gives the broadcaster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .plan import Sublayer

if TYPE_CHECKING:
    from .broadcaster import Broadcaster


class Detachable(Protocol):
    """Something done to a model that can be undone."""

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
        """Make the model's blocks ask `broadcaster.call` what to do; one by one, so that what was done can be undone if one fails."""

    def timestep(self, *args: Any, **kwargs: Any) -> torch.Tensor | float | None:
        """The timestep among these arguments."""
