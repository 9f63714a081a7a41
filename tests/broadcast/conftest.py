"""What the tests of the broadcast share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pab_kernels import ops
from pab_kernels.broadcast import stream as stream_module


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the fused operations that the stream calls."""
    calls: Counter[str] = Counter()

    def wrapped(name: str) -> Callable[..., Any]:
        original = getattr(ops, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return operation

    for name in ("broadcast_residual", "project_residual"):
        monkeypatch.setattr(stream_module.ops, name, wrapped(name))
    return calls
