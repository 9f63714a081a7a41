"""JSON as its standard defines it, where every number is finite."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(data: Any) -> str:
    """`data` as strict JSON, one entry a line; a number that is not finite becomes null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
