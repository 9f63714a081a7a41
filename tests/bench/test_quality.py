from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from bench import quality


@pytest.mark.parametrize("model", quality.MODELS)
def test_every_model_has_prompts_and_samplings_that_it_knows(model: str) -> None:
    room = quality.MODELS[model]
    assert len({room.parse(prompt) for prompt in quality.PROMPTS[model]}) == 4
    names = [sampling.partition(":")[0] for sampling in quality.SAMPLINGS[model].split(",")]
    assert set(names) <= set(room.SCHEDULERS)


def test_a_scheduler_of_the_other_model_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["bench.quality", "--model", "video", "--schedulers", "unipc:20,ddim:50"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "got scheduler 'ddim'; supported are flow, heun, unipc, dpm++" in capsys.readouterr().err
