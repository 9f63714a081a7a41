from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from bench import calibrate
from pab_kernels.models.demo.shapes import held_out


def test_targets_are_arguments_of_calibrate() -> None:
    assert [calibrate.target(text) for text in calibrate.TARGETS.split(",")][0] == {"floor": 35.0}
    assert calibrate.target("flops=.45") == {"flops": 0.45}


def test_more_clips_than_there_are_unseen_captions_are_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["bench.calibrate", "--clips", "500"])
    with pytest.raises(SystemExit):
        calibrate.main()
    supported = len(held_out()) - calibrate.PROMPTS
    assert f"got 500 clips; supported are up to {supported}, each with its own caption" in capsys.readouterr().err
