from __future__ import annotations

from types import SimpleNamespace

import pytest

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
    assert all(given == (("a", "b"), quality.CONFIGS[n.removesuffix(", fitted")]) for n, given in found.items())


def test_a_scheduler_of_the_other_model_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["bench.quality", "--model", "video", "--schedulers", "unipc:20,ddim:50"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "got scheduler 'ddim'; supported are flow, heun, unipc, dpm++" in capsys.readouterr().err
