"""Prompts of Open-Sora 1.2: scores, cleaning, embeddings by T5; and embeddings from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compat import cleaned_caption
from ...extras import require
from ...files import path_of
from .checkpoint import read

EMBEDDINGS, MASK = ("prompt_embeds", "y"), ("prompt_attention_mask", "mask")
"""Names of the tensors in a file of embeddings: those of the pipeline's arguments, and the original's."""


def with_scores(
    prompt: str, aesthetic: float | None = 6.5, motion: float | None = None, camera_motion: str | None = None
) -> str:
    """A prompt with the scores that the captions of training end with; those that it names itself are kept.

    >>> with_scores("a beach", motion=4)
    'a beach aesthetic score: 6.5. motion score: 4.0.'
    """
    scores = {
        "aesthetic score:": None if aesthetic is None else f"{aesthetic:.1f}",
        "motion score:": None if motion is None else f"{motion:.1f}",
        "camera motion:": camera_motion,
    }
    added = [f" {name} {value}." for name, value in scores.items() if value is not None and name not in prompt]
    return prompt + "".join(added)


def cleaned(prompt: str) -> str:
    """A prompt as the captions of training were cleaned: without HTML, addresses, CJK and odd punctuation; twice.

    Raises:
        ModuleNotFoundError: ftfy, beautifulsoup4 or diffusers is not installed.
    """
    for package in ("ftfy", "bs4", "diffusers"):
        require(package, "cleaning a prompt (clean_prompt=False leaves it out)")
    return cleaned_caption(cleaned_caption(prompt))


@torch.no_grad()
def encode(
    prompts: Sequence[str], tokenizer: Any, text_encoder: Any, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Embed prompts by T5, padded or cut to a number of tokens.

    Args:
        prompts: cleaned texts.
        tokenizer, text_encoder: of transformers.
        tokens: L.
        device: of the text encoder.

    Returns:
        The embeddings `[B, L, C]` and their mask `[B, L]`, 1 for text and 0 for padding.
    """
    options = {"max_length": tokens, "padding": "max_length", "truncation": True, "return_attention_mask": True}
    found = tokenizer(list(prompts), add_special_tokens=True, return_tensors="pt", **options).to(device)
    mask = found["attention_mask"]
    return text_encoder(input_ids=found["input_ids"], attention_mask=mask)[0], mask


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """Read embeddings of prompts and their mask: the arguments `prompt_embeds` and `prompt_attention_mask`.

    Args:
        path: a safetensors file, or a .pt of torch, of which only tensors are read. It holds `prompt_embeds` (or `y`)
            `[B, L, C]` or `[B, 1, L, C]`, and `prompt_attention_mask` (or `mask`) `[B, L]`.

    Raises:
        ValueError: the file holds something else.
    """
    path = path_of(path)
    tensors = read(path, None, None)
    found = [next((tensors[name] for name in names if name in tensors), None) for names in (EMBEDDINGS, MASK)]
    if any(tensor is None for tensor in found):
        expected = " and ".join(" or ".join(names) for names in (EMBEDDINGS, MASK))
        raise ValueError(f"{path} holds {', '.join(tensors) or 'nothing'}; {expected} are needed")
    return {names[0]: tensor for names, tensor in zip((EMBEDDINGS, MASK), found, strict=True) if tensor is not None}
