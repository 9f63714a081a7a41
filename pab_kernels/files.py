"""Files written whole or not at all, strict JSON, and errors in one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 2**20
"""The longest text that `read_text` takes. A config has a few hundred bytes; a device or a video under its name has no end."""


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
    shown = shortened(str(path))
    try:
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {shown}") from None
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{shown} has more than {MOST_BYTES:,} bytes; it holds no config")
    try:
        return data.decode("utf-8-sig")  # with the mark that some editors begin it with
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown}: {error}") from None


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
    """A new file to write to, with the ending of `path`, which takes the place of `path` when the block ends without an error.

    The new file lies in the same folder, and is on the disk before it is renamed: `path` is at any time the old file or the complete new
    one, also after a full disk, an interruption or a kill. Where `path` is a link, the file that it leads to is replaced.

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


# JSON


def to_json(data: Any) -> str:
    """`data` as strict JSON, one entry a line: a number that is not finite is null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def from_json(text: str) -> Any:
    """The data of strict JSON.

    Raises:
        ValueError: it is not JSON, holds a number that is not finite or a name twice, or is nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_named_once, parse_constant=_refused, parse_float=_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise ValueError(f"{shown(name)} occurs twice")
        data[name] = value
    return data


def _number(token: str) -> float:
    number = float(token)
    return number if math.isfinite(number) else _refused(shortened(token))


def _refused(token: str) -> Any:
    raise ValueError(f"{token} is no number of JSON; they are finite")


# Messages

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


def one_line(error: object) -> str:
    """What an error says, on one line of at most 1,000 characters that a terminal can show.

    The error of a file names the file, and gives the system's reason.
    """
    said = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        said = f"{os.fsdecode(error.filename)}: {error.strerror}" if isinstance(error.filename, (str, bytes)) else error.strerror
    said = " ".join(said.split()) or type(error).__name__
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in said)
    return shortened(shown, 1000)
