"""Inference, as everywhere under PAB."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _no_flops(no_flops: None) -> None:
    """Few of these tests look at FLOPs."""
