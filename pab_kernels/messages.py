"""Values and errors on one line of bounded length."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 5, 100, 60, 200
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 12


def shortened(text: str, most: int = 200) -> str:
    """`text`, or its two ends if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


def shown(value: Any) -> str:
    """`repr(value)`, cut to a bounded length: a value given by a user may be a list of a million."""
    try:
        return shortened(_REPR.repr(value))
    except ValueError:  # Python does not print an integer of more than 4,300 digits
        return "a number of very many digits"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type: torch and ffmpeg append lines of internals."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def joined(error: object) -> str:
    """An error's message with its lines joined, or its type."""
    return " ".join(str(error).split()) or type(error).__name__


def one_line(error: object) -> str:
    """An error's message on one line of at most 1,000 characters; an `OSError` becomes its file and its reason.

    Characters that a terminal cannot show, such as control characters and lone surrogates, are escaped.
    """
    text = joined(error)
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        text = joined(name + error.strerror)
    escaped = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return shortened("".join(escaped), 1000)


def ranges(numbers: Iterable[int]) -> str:
    """Rising numbers as text, with those in a row as their first and last.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
