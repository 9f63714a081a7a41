"""Standard output and error of a program: closed, full, or read by something that ends first."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from .messages import one_line


def fail(error: object, code: int) -> NoReturn:
    """End the program with one line."""
    with contextlib.suppress(OSError):  # who cannot be told is told by the code
        print(f"pab: {one_line(error)}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Run a program whose report must reach its reader: where it does not, the exit code is 1.

    A reader that ends first, as in `pab plan --list | head -1`, is left in peace; any other reason is one line. A
    character that the terminal's encoding lacks is escaped. Without standard output nothing is begun: there would be
    nowhere to report to.

    Raises:
        SystemExit: always, with the program's code or 1.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the program runs
    if sys.stdout is None:
        fail("standard output is closed, and the report would be lost; redirect it to a file or to /dev/null", 1)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code: Any = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
    except OSError as error:
        code = _report(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            code = code or _report(error)
            with contextlib.suppress(OSError):  # Python flushes once more when it ends, and complains
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code)


def _report(error: OSError) -> int:
    if not isinstance(error, BrokenPipeError):
        with contextlib.suppress(SystemExit):
            fail(error, 1)
    return 1
