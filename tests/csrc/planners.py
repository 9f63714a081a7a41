"""`pab_kernels._host`, the planners of the CUDA kernels, where they were compiled."""

from __future__ import annotations

from typing import Any

import pytest


def host() -> Any:
    """The module; without it the test that asks is skipped."""
    return pytest.importorskip("pab_kernels._host", reason="the planners are not compiled: `make extension` does it")
