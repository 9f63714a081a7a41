"""Arguments of a pipeline that have no option of their own."""

from __future__ import annotations

import json
from typing import Any


def named_arguments(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs; a value is JSON, or else the text as it is."""
    arguments: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--argument takes NAME=VALUE such as height=256, got {pair!r}")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments
