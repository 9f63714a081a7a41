"""Files read with care, and written whole or not at all."""

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
"""The longest text that `read_text` takes.

A config has a few hundred bytes; a device or a video under its name has no end.
"""


def path_of(given: Any) -> Path:
    """`given` as a path.

    Raises:
        ValueError: it is neither a string nor a path, or no file can have this name.
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
    """The text of a regular file in UTF-8, of at most `MOST_BYTES`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, too long, not UTF-8, or cannot be read.
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
        return data.decode("utf-8-sig")  # with the mark that some editors begin it with
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {error}") from None


def check_regular(path: Path) -> None:
    """Refuse a path that is no regular file: a folder fails when it is read, a pipe waits, a device may have no end.

    Raises:
        OSError: there is no such file, or it cannot be looked at; a link that leads to itself is one.
        ValueError: it is a folder, a pipe, a device or a socket.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise ValueError(f"{path} is {what}, not a file")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file to write to, with the ending of `path`, which takes the place of `path` when the block ends without an
    error.

    The new file lies in the same folder, and is on the disk before it is renamed: `path` is at any time the old file or
    the complete new one, also after a full disk, an interruption or a kill. Where `path` is a link, the file that it
    leads to is replaced.

    Raises:
        OSError: `path` cannot be written; it names `path`.
        ValueError: no file can have this name, or `path` is not a regular file.
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
            os.fsync(file.fileno())  # some file systems find out only now that the disk is full
        os.replace(made, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(given)) from error
    finally:
        if made is not None:
            with contextlib.suppress(OSError):
                made.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` in UTF-8 in place of what `path` held, as `replacing` does."""
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8")
    return Path(path)
