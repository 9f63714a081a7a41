"""Reading files with checks, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .messages import shortened, shown

MOST_BYTES = 2**20
"""The longest text that `read_text` reads: a config has a few hundred bytes, a video by its name may have billions."""


def path_of(given: Any) -> Path:
    """`given` as a path.

    Raises:
        ValueError: it is neither a string nor a path, or the system does not allow the name.
    """
    if not isinstance(given, (str, os.PathLike)) or isinstance(os.fspath(given), bytes):
        raise ValueError(f"a path is a string or a pathlib.Path, got {shown(given)}")
    try:
        encoded = os.fsencode(given)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise ValueError(f"no file can be named {shown(str(given))}")
    return Path(given)


def read_text(path: str | Path) -> str:
    """The text of a regular file in UTF-8 of at most `MOST_BYTES`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, is too long or not UTF-8, or cannot be read.
    """
    path = path_of(path)
    name = shortened(str(path))
    try:
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {name}") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES:,} bytes; it holds no config")
    try:
        return data.decode("utf-8-sig")  # without the mark that some editors begin a file with
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {error}") from None


def check_regular(path: Path) -> None:
    """Refuse a path that is not a regular file: reading a pipe may block, and a device may have no end.

    Raises:
        OSError: there is no such file, or its type cannot be read, as for a link to itself.
        ValueError: it is a folder, a pipe, a device or a socket.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise ValueError(f"{path} is {what}, not a file")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, with the ending of `path`, that replaces `path` if the block ends without an error.

    The temporary file lies in the same folder and is flushed to disk before it is renamed: `path` is always either the
    old file or the complete new one, even after a full disk, an interruption or a kill. A symbolic link stays, and the
    file it points to is replaced. A file that is replaced keeps its permissions.

    Args:
        path: the file to write.

    Raises:
        OSError: `path` cannot be written; the error names it.
        ValueError: the system does not allow the name, or `path` is not a regular file.
    """
    given = path_of(path)
    made: Path | None = None
    try:
        with contextlib.suppress(FileNotFoundError):
            check_regular(given)
        target = Path(os.path.realpath(given))
        made = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
        os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if target.exists():
            shutil.copymode(target, made)
        yield made
        with open(made, "rb") as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
        os.replace(made, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(given)) from error
    finally:
        if made is not None:
            with contextlib.suppress(OSError):
                made.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` in UTF-8 to `path`, as `replacing` does, and return the path."""
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8")
    return Path(path)
