from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("diffusers")

from bench import quality


@pytest.mark.parametrize("model", quality.MODELS)
def test_every_model_has_prompts_and_samplings_that_it_knows(model: str) -> None:
    room = quality.MODELS[model]
    assert len({room.parse(prompt) for prompt in quality.PROMPTS[model]}) == 4
    names = [sampling.partition(":")[0] for sampling in quality.SAMPLINGS[model].split(",")]
    assert set(names) <= set(room.SCHEDULERS)


def test_configs_with_linear_reuses_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.pab, "fit", lambda pipe, prompts, config, **_: (tuple(prompts), config))
    found = quality.fitted(SimpleNamespace(pipe=None), 30, ["a", "b"])  # type: ignore[arg-type]
    assert found.keys() == {
        "preset balanced-line, fitted",
        "sublayers 2 linear (preset demo), fitted",
        "blocks 2 linear, fitted",
    }
    wanted = {n: ((("a", "b"), quality.CONFIGS[n.removesuffix(", fitted")]), 30) for n in found}
    assert found == wanted, "a config and its steps"


def test_rows_have_lpips_where_it_loads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clips = torch.rand(2, 3, 3, 32, 32)
    found: list[dict[str, Any]] = []
    missing = mock.Mock(side_effect=ModuleNotFoundError("not installed"))
    for load in (missing, lambda: lambda a, b: float(abs(a - b).mean())):
        quality.perceptual.cache_clear()
        monkeypatch.setattr(quality, "load_lpips", load)
        found += [quality.closeness(clips, clips), quality.closeness(clips, 0.5 * clips)]
    quality.perceptual.cache_clear()
    assert ["lpips" in row for row in found] == [False, False, True, True]
    assert found[2]["lpips"] == 0 and found[3]["lpips"] == pytest.approx(float(0.5 * clips.mean()), abs=1e-4)
    assert capsys.readouterr().err == "without LPIPS: not installed\n", "once"


def test_a_scheduler_of_the_other_model_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["bench.quality", "--model", "video", "--schedulers", "unipc:20,ddim:50"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "got scheduler 'ddim'; supported are flow, heun, unipc, dpm++" in capsys.readouterr().err
