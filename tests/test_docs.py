"""What the pages show runs: every code block of a page, from top to bottom in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from pab_kernels import cli

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("commands.md",)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

if not DOCS.is_dir():
    pytest.skip("the pages are not here", allow_module_level=True)


def _run_command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "pab":
        done = CliRunner().invoke(cli.build_app(), arguments)
        assert done.exit_code == 0, f"{line}: {done.output}"
    else:
        assert program == "python", f"the page runs {program!r}; this test knows pab and python"
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = _BLOCK.findall((DOCS / page).read_text())
    assert blocks
    for language, text in blocks:
        if language == "python":
            exec(compile(text, page, "exec"), names)
        else:
            assert language == "sh", f"a block of {page} is of no language that this test runs: {language!r}"
            for line in text.splitlines():
                _run_command(line)
