"""How the tests are laid out: like the package, and each on its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pab_kernels

TESTS = Path(__file__).parent
PACKAGE = Path(pab_kernels.__file__).parent
OTHERS = {
    "bench": "the folder bench",
    "csrc": "the folders csrc, python and cmake",
    "kernels": "what the compiler makes of the Triton kernels in pab_kernels/ops",
    "works_with": "PAB together with other libraries",
}
"""Folders of tests that are not of a folder of the package, and what they test."""


def _taken_from_tests(source: str) -> Iterator[str]:
    """Names that a module imports from a test, and private ones from a support module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                alias.name for alias in node.names if alias.name.startswith("tests.") and ".test_" in alias.name
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tests":
            of_a_test = ".test_" in f".{node.module}"
            names = [alias.name for alias in node.names]
            yield from (f"{node.module}.{name}" for name in names if of_a_test or name.startswith(("_", "test_")))


def test_no_test_is_built_on_another() -> None:
    taken = {str(path.relative_to(TESTS)): list(_taken_from_tests(path.read_text())) for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in taken.items() if names} == {}, (
        "what several tests need is a module of its own"
    )


def test_every_way_to_take_from_a_test_is_seen() -> None:
    for bad in (
        "from tests.adapters.test_generic import outputs",
        "from tests.adapters import test_generic",
        "import tests.adapters.test_generic",
        "from tests.adapters.tiny_models import TEXT, _t",
        "def test():\n    from tests.test_api import toy",
    ):
        assert list(_taken_from_tests(bad)), bad
    for fine in (
        "from tests.adapters.tiny_models import TEXT",
        "from pab_kernels.ops import _host",
        "import tests.oracle",
    ):
        assert list(_taken_from_tests(fine)) == [], fine


def test_the_folders_are_those_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/*.py")}
    package = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= package | OTHERS.keys() and not package & OTHERS.keys()
