"""A program whose standard output is closed, full, a pipe whose reader ends first, or in another encoding."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pab_kernels.streams import fail, standard_streams

ROOT = Path(__file__).parents[1]
FULL = Path("/dev/full")


def _ended(text: str = "report", code: int | None = None) -> Any:
    with pytest.raises(SystemExit) as end, standard_streams():
        print(text)
        if code is not None:
            raise SystemExit(code)
    return end.value.code


@pytest.fixture
def broken() -> Iterator[Any]:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as stream:
        yield stream  # closing it does not raise: the unread text is lost


@pytest.mark.parametrize("code", [None, 0, 2])
def test_what_is_printed_arrives_and_the_code_is_the_program_s(code: int | None, capsys: Any) -> None:
    assert _ended(code=code) == (code or 0) and tuple(capsys.readouterr()) == ("report\n", "")


@pytest.mark.parametrize("size", [1, 10**6])  # fits into the buffer, and does not
def test_a_reader_that_ends_first_is_left_in_peace(
    size: int, broken: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    assert _ended("x" * size) == 1 and capsys.readouterr().err == ""


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("size", [1, 10**6])
def test_a_full_disk_is_one_line(size: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with FULL.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert _ended("x" * size) == 1
    assert capsys.readouterr().err == "pab: No space left on device\n"


def test_without_standard_output_nothing_is_begun(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as end, standard_streams():
        pytest.fail("it is begun")
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("pab: standard output is closed") and said.count("\n") == 1


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_an_error_that_cannot_be_said_is_in_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with FULL.open("w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as end, standard_streams():
            fail("no", 2)
    assert end.value.code == 2


def test_a_character_that_the_encoding_lacks_is_escaped(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert _ended("ü\udc80 ☃") == 0 and raw.getvalue() == b"\\xfc\\udc80 \\u2603\n"


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("program", "redirection", "code", "lines"),
    [
        ("plan --config pab246 --steps 9", "> /dev/full", 1, 1),
        ("plan --config pab246 --steps 9", ">&-", 1, 1),
        ("plan --list", "| true", 0, 0),
        ("plan --config pab246 --steps 9999 --json", "| true", 0, 0),  # more than a pipe holds
        ("--help", "> /dev/full", 1, 1),
        ("plan --config pab246 --steps 0", "2> /dev/full", 2, 0),
    ],
)
def test_the_script_ends_so_as_a_process(program: str, redirection: str, code: int, lines: int, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"{sys.executable} -W ignore -c 'from pab_kernels.cli import main; main()' {program} {redirection}"
    done = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and done.stdout == "" and len(done.stderr.splitlines()) == lines, done.stderr
