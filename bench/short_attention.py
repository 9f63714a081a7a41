"""Cases of `short_attention`: temporal attention, over the frames of every place in the picture."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .attention_case import Attention, case
from .case import Case
from .geometries import Geometry

OP = "short_attention"


def cases(name: str, geometry: Geometry, dtype: torch.dtype) -> Iterator[Case]:
    """The cases at this geometry: none where attention is over all frames at once."""
    if not geometry.factorised:
        return
    yield case(name, "temporal", Attention(OP, "temporal", geometry), dtype)
    if geometry.small:
        yield case(name, "temporal, store int8", Attention(OP, "temporal", geometry, torch.int8), dtype)
        yield case(name, "temporal, store int4", Attention(OP, "temporal", geometry, torch.int4), dtype)
