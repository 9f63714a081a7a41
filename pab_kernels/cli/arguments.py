"""What options hold in one text: numbers, and arguments of a pipeline that have no option of their own."""

from __future__ import annotations

from collections.abc import Collection
from json import JSONDecodeError
from typing import Any

from ..messages import shown
from ..strict_json import from_json


def numbers(
    text: str | None, option: str, separator: str, kind: type[int] | type[float], counts: Collection[int] | None = None
) -> Any:
    """The numbers in the text of an option, a tuple; None where it was not given.

    Args:
        text: as it was given.
        option: what it takes, for the message that says so.
        separator: between the numbers.
        kind: of them.
        counts: how many there may be; default any.
    """
    if text is None:
        return None
    try:
        found: tuple[float, ...] = tuple(kind(part) for part in text.lower().split(separator))
    except ValueError:
        found = ()
    if not found or len(found) not in (counts or (len(found),)):
        raise ValueError(f"{option}, got {text!r}")
    return found


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
