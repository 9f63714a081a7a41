"""docs/models.md and the README say what the tests do."""

from __future__ import annotations

from pathlib import Path

from tests.adapters.models_table import PAGE, page, summary


def test_the_page_of_models_is_what_the_tests_run() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "`python -m tests.adapters.models_table` makes it anew"


def test_the_readme_has_its_summary() -> None:
    assert summary() in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
