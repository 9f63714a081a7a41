"""Cases of `attention`: spatial, over all frames, and cross attention with key lengths."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .attention_case import Attention, case
from .case import Case
from .geometries import Geometry

OP = "attention"


def cases(name: str, geometry: Geometry, dtype: torch.dtype) -> Iterator[Case]:
    """The cases at this geometry."""
    title = "spatial" if geometry.factorised else "all frames"
    yield case(name, title, Attention(OP, "spatial", geometry), dtype)
    if geometry.text:
        yield case(name, "cross", Attention(OP, "cross", geometry), dtype)
    if geometry.joint:  # a model whose blocks may be single ones, which keep attention's output before the projection
        yield case(name, f"{title}, store int8", Attention(OP, "spatial", geometry, torch.int8), dtype)
    if geometry.small:
        yield case(name, f"{title}, store fp8", Attention(OP, "spatial", geometry, torch.float8_e4m3fn), dtype)
        yield case(name, f"{title}, store int4", Attention(OP, "spatial", geometry, torch.int4), dtype)
