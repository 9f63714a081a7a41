"""Arguments of a pipeline that have no option of their own."""

from __future__ import annotations

from json import JSONDecodeError
from typing import Any

from ..messages import shown
from ..strict_json import from_json


def named_arguments(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs; a value is JSON, or else the text as it is."""
    arguments: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--argument takes NAME=VALUE such as height=256, got {shown(pair)}")
        try:
            arguments[name] = from_json(value)
        except JSONDecodeError:
            arguments[name] = value
        except ValueError as error:
            raise ValueError(f"--argument {name}: {error}") from None
    return arguments
