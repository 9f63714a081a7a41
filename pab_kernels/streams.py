"""Standard output and error of a program, which may be closed, full, or a pipe whose reader has ended."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from .messages import one_line


def fail(error: object, code: int) -> NoReturn:
    """Print an error on one line and exit with `code`."""
    with contextlib.suppress(OSError):  # if standard error fails too, only the exit code reports the error
        print(f"pab: {one_line(error)}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Run a program and exit with 1 if its output could not be written.

    If the reader of a pipe ends first, as in `pab plan --list | head -1`, nothing is printed; any other reason is
    printed on one line. Characters that the terminal's encoding lacks are escaped. If standard output is closed, the
    program does not start, because its report would be lost.

    Raises:
        SystemExit: always, with the program's exit code or 1.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  stays open until the program ends
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
            with contextlib.suppress(OSError):  # Python flushes again at exit and would print a traceback
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code)


def _report(error: OSError) -> int:
    if not isinstance(error, BrokenPipeError):
        with contextlib.suppress(SystemExit):
            fail(error, 1)
    return 1
