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
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("imageio_ffmpeg")

from typer.testing import CliRunner

from pab_kernels import cli

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = {
    "architecture.md": "shows excerpts",
    "benchmarks.md": "shows commands that take hours or need a GPU",
    "your_own_dit.md": "is run by test_docs_dit.py",
}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

if not DOCS.is_dir():
    pytest.skip("the pages are not here", allow_module_level=True)


PAGES = sorted(
    page.name for page in DOCS.glob("*.md") if page.name not in ELSEWHERE and _BLOCK.search(page.read_text())
)


def _run_command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "pab":
        done = CliRunner().invoke(cli.build_app(), arguments)
        assert done.exit_code == 0, f"{line}: {done.output}"
    else:
        assert program == "python", f"the page runs {program!r}; this test knows pab and python"
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates; imageio's reader leaves a pipe to the
# collector
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("measured_once")
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


def _sections(page: str) -> dict[str, str]:
    """The text of each `##` section, by its title."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_option_of_every_command_is_on_the_page_and_no_other() -> None:
    import typer

    sections = {title: text for title, text in _sections("commands.md").items() if title.startswith("pab ")}
    commands: dict[str, Any] = typer.main.get_command(cli.build_app()).commands  # type: ignore[attr-defined]
    assert set(sections) == {f"pab {name}" for name in commands}
    for name, command in commands.items():
        text = sections[f"pab {name}"]
        options = {
            option for p in command.params for option in (*p.opts, *p.secondary_opts) if option.startswith("--")
        } - {"--help"}
        told = set(re.findall(r"(?<=[`/ ])--[a-z][a-z0-9-]*(?=[`, =])", text.replace("\n", " ")))
        assert options - told == set(), f"pab {name} has options that docs/commands.md does not tell of"
        assert told - options == set(), f"docs/commands.md tells of options that pab {name} does not have"


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target, section in re.findall(r"\]\(([^)#:\s]*)(#[^)]*)?\)", _BLOCK.sub("", page.read_text())):
            led = page.parent / target if target else page
            assert led.exists(), f"{page.name} leads to {target}"
            headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", led.read_text()), re.MULTILINE) if section else []
            slugs = ["#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not section or section in slugs, f"{page.name} leads to {target}{section}"
