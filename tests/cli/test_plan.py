"""`pab plan` as a user calls it."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("diffusers")

from typer.testing import CliRunner

from pab_kernels import cli


def pab(*arguments: object) -> Any:
    return CliRunner().invoke(cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_schedule_and_table_are_printed() -> None:
    result = pab("plan", "--model", "latte", "--config", "pab246", "--steps", 10)
    assert result.exit_code == 0, result.output
    for said in ("spatial  ##S.S.S.##", "without PAB", "total", "device memory"):
        assert said in result.output


def test_json_is_printed_alone() -> None:
    data = json.loads(pab("plan", "--model", "latte", "--steps", 10, "--json").stdout)
    assert data["size"] == [16, 512, 512] and data["steps"] == 10 and data["flops"] < data["flops_without"]


def test_known_models_are_listed() -> None:
    assert "open-sora-1.2" in pab("plan", "--list").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cogvideo"], "pab: there is no model 'cogvideo'; did you mean 'cogvideox-5b'"),
        (["--model", "latte", "--size", "16x512"], "pab: --size takes frames x height x width"),
        (["--model", "latte", "--size", "15x512x512"], "pab: size 15x512x512: 15 frames do not fit; this model has 16"),
        (["--model", "latte", "--steps", "0"], "pab: --steps must be at least 1, got 0"),
        (["--model", "latte", "--config", "none.yaml"], "pab: there is no file none.yaml"),
        (["--model", "latte", "--config", "pab247"], "pab: there is no preset 'pab247'; did you mean 'pab246'?"),
        ([], "pab: pab plan needs --model, or --config and --steps"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = pab("plan", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.output
