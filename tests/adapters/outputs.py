"""What a model of any kind gives, as tensors, and whether two gave the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The tensors in what the model returns."""
    return [v for v in pytree.tree_leaves(model(**inputs)) if isinstance(v, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether both are equal to the bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))
