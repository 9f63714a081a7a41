from __future__ import annotations

import importlib.resources
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")

from pab_kernels.models.demo import check, shapes
from pab_kernels.models.demo.pipeline import load, read_weights
from pab_kernels.models.demo.shapes import Caption

CARD = "# A model\n<!-- figures: begin (written by --export) -->\nold\n<!-- figures: end -->\nend\n"


def test_the_check_passes_on_drawn_clips():
    report = check.check_data()
    assert report.whole == report.clips == 100 and report.share == 1
    assert all(s.followed for s in report.scores)


def test_wrong_words_are_counted_against_their_word():
    captions = [Caption("red", "circle", "left", "night"), Caption("blue", "circle", "left", "day")]
    clips = shapes.render_batch(
        [Caption("red", "circle", "right", "night"), Caption("blue", "circle", "left", "day")], torch.Generator()
    )
    report = check.score(captions, clips)
    scores = {s.word: (s.shown, s.asked) for s in report.scores}
    assert (
        scores["left"] == (1, 2)
        and scores["circle"] == (2, 2)
        and scores["red"] == (1, 1)
        and scores["green"] == (0, 0)
    )
    assert report.whole == 1 and report.share == 7 / 8
    assert "| direction | left | 1 of 2 | 50 % (not followed) |" in str(report) and "green" not in str(report)
    assert json.loads(json.dumps(report.to_dict()))["whole_caption"] == 1


def test_open_slots_ask_for_nothing():
    clip = shapes.render(Caption("red", "circle", "left", "night"), torch.Generator())
    assert check.shows(Caption(colour="red"), clip) and not check.shows(Caption(colour="blue"), clip)
    assert check.score([Caption(colour="red")], clip[None]).share == 1


def test_clips_and_captions_must_pair_up():
    with pytest.raises(ValueError, match="2 clips and 1 captions"):
        check.score([Caption()], torch.zeros(2, 8, 3, 32, 32))


def test_the_model_is_checked_in_batches_of_its_captions(monkeypatch):
    monkeypatch.setattr(check, "BATCH", 2)
    seen = []
    report = check.check_model(
        load(device="cpu"), shapes.held_out()[:3], steps=1, progress=lambda done, total: seen.append((done, total))
    )
    assert report.clips == 3 and seen == [(2, 3), (3, 3)]


def test_figures_replace_what_stands_between_the_markers():
    filled = check.fill_card(CARD, "new\n")
    assert filled == CARD.replace("old", "new") and check.fill_card(filled, "new") == filled
    with pytest.raises(ValueError, match="no place for the figures"):
        check.fill_card("# A model", "new")


def test_the_shipped_card_has_figures_of_the_shipped_weights():
    card = importlib.resources.files("pab_kernels.models.demo").joinpath("README.md").read_text()
    assert check.fill_card(card, "x") != card
    assert read_weights().sha256 in card


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The training script."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("train_demo_model")


def test_export_writes_half_precision_weights_and_fills_the_card(training, tmp_path, monkeypatch, capsys):
    model = training.Model()
    averaged = model.state_dict()
    torch.save({"model": {}, "average": averaged, "opts": [], "step": 17}, tmp_path / "checkpoint.pt")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "README.md").write_text(CARD)
    monkeypatch.setattr(shapes, "held_out", lambda: [Caption("red", "circle", "left", "night")])

    arguments = Namespace(out=tmp_path, export=tmp_path / "package", device="cpu", check_steps=1, check_guidance=1.5)
    training.export(arguments)
    first = (tmp_path / "package" / "weights.safetensors").read_bytes()
    training.export(arguments)
    assert (tmp_path / "package" / "weights.safetensors").read_bytes() == first  # the card names their sum

    weights = read_weights(tmp_path / "package" / "weights.safetensors")
    assert weights.training["steps"] == "17" and weights.tensors.keys() == averaged.keys()
    assert all(torch.equal(t, averaged[name].half()) for name, t in weights.tensors.items())
    card = (tmp_path / "package" / "README.md").read_text()
    assert weights.sha256 in card and "steps 17" in card and "| background | night |" in card and "old" not in card
    assert "In fewer: " in capsys.readouterr().out


def test_export_without_a_checkpoint_says_so(training, tmp_path):
    with pytest.raises(SystemExit, match="does not exist: train first"):
        training.export(Namespace(out=tmp_path, export=tmp_path))
