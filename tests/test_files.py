"""Files written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pab_kernels.files import replacing, write_text
from pab_kernels.messages import one_line


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as made:
        made.write_text("new")
        assert made.parent == tmp_path and made.suffix == ".json" and not path.exists()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("no"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(type(error)), replacing(path) as made:
        made.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    for path, number in ((tmp_path / "none" / "a.txt", errno.ENOENT), (tmp_path / ("n" * 300), errno.ENAMETOOLONG)):
        with pytest.raises(OSError) as info:
            write_text(path, "")
        assert info.value.errno == number and info.value.filename == str(path)
        assert one_line(info.value) == f"{path}: {os.strerror(number)}"


def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError) as info, replacing(tmp_path / "a.txt"):
        Path("/dev/full").write_text("x")
    assert one_line(info.value) == f"{tmp_path / 'a.txt'}: No space left on device" and not list(tmp_path.iterdir())


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("there", "not-yet"):
        (tmp_path / name).symlink_to(tmp_path / "folder" / name)
    (tmp_path / "folder" / "there").write_text("old")
    for name in ("there", "not-yet"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "folder" / name).read_text() == "new"


def test_rights_are_those_that_the_file_had_or_that_a_new_one_gets(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "private").write_text("")
    (tmp_path / "private").chmod(0o600)
    for name in ("new", "private"):
        write_text(tmp_path / name, "x")
    modes = {name: (tmp_path / name).stat().st_mode for name in ("plain", "new", "private")}
    assert modes["new"] == modes["plain"] and modes["private"] & 0o777 == 0o600


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, error, message in (
        (tmp_path / "pipe", ValueError, "is a pipe, a device or a socket, not a file"),
        ("/dev/null", ValueError, "is a pipe, a device or a socket, not a file"),
        (tmp_path, ValueError, "is a folder, not a file"),
        (tmp_path / "loop", OSError, "Too many levels of symbolic links"),
        ("a\0b", ValueError, r"no file can be named 'a\\x00b'"),
        (None, ValueError, "a path is a string or a pathlib.Path, got None"),
    ):
        with pytest.raises(error, match=message):
            write_text(path, "x")  # type: ignore[arg-type]
    assert Path("/dev/null").is_char_device() and {p.name for p in tmp_path.iterdir()} == {"pipe", "loop"}
