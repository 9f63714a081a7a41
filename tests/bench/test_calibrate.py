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


def test_unseen_clips_have_captions_of_their_own_or_all_of_the_video_model_s_in_turn() -> None:
    known, unseen = calibrate.captions("demo", 40)
    assert len(known) == calibrate.PROMPTS and len({*known, *unseen}) == calibrate.PROMPTS + 40
    known, unseen = calibrate.captions("video", 40)
    assert len(known) == calibrate.PROMPTS and len({*unseen}) == 12 and {*known} < {*unseen}
    assert unseen[:12] == unseen[12:24] and {word for text in known for word in text.split()} >= {"bunny,", "fast"}
