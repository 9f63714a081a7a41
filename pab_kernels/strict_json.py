"""JSON as its standard defines it, where every number is finite, and with every name once."""

from __future__ import annotations

import json
import math
from typing import Any

from .messages import shortened, shown


def to_json(data: Any) -> str:
    """`data` as strict JSON, one entry a line; a number that is not finite becomes null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def from_json(text: str) -> Any:
    """Parse strict JSON.

    Raises:
        ValueError: it is not JSON, has a number that is not finite or a name twice, or is nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_named_once, parse_constant=_refused, parse_float=_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise ValueError(f"{shown(name)} occurs twice")
        data[name] = value
    return data


def _number(token: str) -> float:
    number = float(token)
    return number if math.isfinite(number) else _refused(shortened(token))


def _refused(token: str) -> Any:
    raise ValueError(f"{token} is not a number of JSON; they are finite")
