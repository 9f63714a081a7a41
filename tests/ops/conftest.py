"""What the tests of the operations share."""

from __future__ import annotations

import pytest

from pab_kernels.ops import dispatch


@pytest.fixture(params=["plain torch", "one operation"])
def opaque(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a compiled call is an operation in the graph, as on a device that has kernels, or the reference's plain
    torch."""
    one = request.param == "one operation"
    if one:
        monkeypatch.setattr(dispatch, "is_traced", lambda op, backend, device: False)
    return one
