"""What was given and what went wrong, in one line of bounded length."""

from __future__ import annotations

import os
import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 5, 100, 60, 200
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 12


def shortened(text: str, most: int = 200) -> str:
    """`text`, or its two ends where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


def shown(value: Any) -> str:
    """`repr(value)`, cut where it is long: what was given may be a list of a million, or refer to itself."""
    try:
        return shortened(_REPR.repr(value))
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of very many digits"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind: torch and ffmpeg go on with what is theirs."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def joined(error: object) -> str:
    """What an error says, its lines joined to one, or its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def one_line(error: object) -> str:
    """What an error says, on one line of at most 1,000 characters that a terminal can show.

    The error of a file names the file, and gives the system's reason.
    """
    said = error
    if isinstance(error, OSError) and error.strerror:
        said = (
            f"{os.fsdecode(error.filename)}: {error.strerror}"
            if isinstance(error.filename, (str, bytes))
            else error.strerror
        )
    printable = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in joined(said)
    )
    return shortened(printable, 1000)
