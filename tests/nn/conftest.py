"""What the tests of modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def compiler() -> Iterator[None]:
    """A compiler that has seen nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
