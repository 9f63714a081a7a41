"""Prompts of Open-Sora: scores, cleaning, and embeddings from files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import save_file

from pab_kernels.models.open_sora.text import cleaned, read_embeddings, with_scores


def test_scores_are_appended_unless_the_prompt_has_them() -> None:
    assert with_scores("a cat") == "a cat aesthetic score: 6.5."
    assert with_scores("a cat", None) == "a cat"
    full = with_scores("a cat", 7, 2.25, "pan right")
    assert full == "a cat aesthetic score: 7.0. motion score: 2.2. camera motion: pan right."
    assert with_scores(full, 1, 1, "none") == full


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Cat,sleeping", "a cat, sleeping"),
        ("<b>bold</b> &amp;lt;text", "bold lt;text"),
        ("see www.site.com/page now", "see now"),
        ("a%20red+circle", "a red circle"),
        ("名 a person 前", "a person"),
        ("“quoted” — dash, it’s", '"quoted" - dash, it\'s'),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("photo.jpg of jc6640vc 1920x1080 @nick #12345", "of"),
        ("***(big)*** [sale]", "big sale"),
    ],
)
def test_prompts_are_cleaned_as_in_training(prompt: str, expected: str) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert cleaned(prompt) == expected


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"cleaning a prompt \(clean_prompt=False leaves it out\) needs .* ftfy"
    ):
        cleaned("a cat")


def test_embeddings_are_read_by_our_names_and_the_original_ones(tmp_path: Path) -> None:
    y, mask = torch.randn(1, 1, 5, 8), torch.tensor([[1, 1, 0, 0, 0]])
    save_file({"prompt_embeds": y, "prompt_attention_mask": mask}, tmp_path / "a.safetensors")
    torch.save({"y": y, "mask": mask}, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        found = read_embeddings(tmp_path / name)
        assert found.keys() == {"prompt_embeds", "prompt_attention_mask"}
        assert torch.equal(found["prompt_embeds"], y) and torch.equal(found["prompt_attention_mask"], mask)
    torch.save({"y": y}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"holds y; prompt_embeds or y and prompt_attention_mask or mask are needed"):
        read_embeddings(tmp_path / "c.pt")
