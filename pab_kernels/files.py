"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, with the ending of `path`, that replaces `path` if the block ends without an error.

    The temporary file lies in the same folder and is flushed to disk before it is renamed: `path` is always either the
    old file or the complete new one, even after a full disk, an interruption or a kill. A symbolic link stays, and the
    file it points to is replaced.

    Args:
        path: the file to write.

    Raises:
        OSError: `path` cannot be written; the error names it.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):  # a device or a pipe is written to, a folder raises
        yield target
        return
    made = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield made
        with open(made, "rb") as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
        os.replace(made, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            made.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` in UTF-8 to `path`, as `replacing` does, and return the path."""
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8")
    return Path(path)
