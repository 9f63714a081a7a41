"""Errors and values in one line of bounded length."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from pab_kernels.messages import first_line, joined, one_line, ranges, shown


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo\t three"), "one two three"),
        (ValueError("a\x1b[31mb\udc80\x00"), r"a\x1b[31mb\udc80\x00"),
        (ValueError(), "ValueError"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.EACCES, "Permission denied", b"raw"), "raw: Permission denied"),
        (OSError("said by a library\nat length"), "said by a library at length"),
    ],
)
def test_an_error_is_one_line_that_a_terminal_can_show(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_the_first_line_of_an_error_and_all_of_them_joined() -> None:
    error = ValueError("\n one\n  two ")
    assert (first_line(error), joined(error)) == ("one", "one two")
    assert first_line(KeyError()) == joined(KeyError()) == "KeyError"


def test_long_things_are_shown_cut() -> None:
    itself: list[Any] = []
    itself.append(itself)
    assert shown(itself) == "[[[[[[...]]]]]]" and shown(10**9999) == "a number of very many digits"
    assert len(shown(list(range(10**6)))) < 200 and len(one_line(ValueError("x" * 10**6))) < 1000


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")])
def test_numbers_in_a_row_are_joined(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
