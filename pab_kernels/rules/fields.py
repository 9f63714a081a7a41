"""Reading a dataclass from the dict of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..messages import shown


def known_fields(cls: Any, data: Any) -> dict[str, Any]:
    """The fields of a dataclass in `data`.

    Raises:
        ValueError: it is no dict, lacks a field without a default, or has one that `cls` does not have.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is read from a dict, got {shown(data)}")
    names = [f.name for f in dataclasses.fields(cls)]
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in data]
    if missing:
        raise ValueError(f"{cls.__name__} needs {', '.join(map(repr, missing))}, got {shown(dict(data))}")
    unknown = [name for name in data if name not in names]
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(map(shown, unknown[:8]))}; it has {', '.join(names)}")
    return dict(data)
