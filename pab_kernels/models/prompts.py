"""Prompts of the models that come with the package: one word for each slot, and a table that embeds them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Vocabulary = Mapping[str, Sequence[str]]
"""The words of a caption, by slot; a caption names at most one word of each."""


def parse_words(prompt: str, vocabulary: Vocabulary, fillers: Collection[str], model: str) -> dict[str, str]:
    """Find the word of each slot in a prompt.

    Args:
        prompt: text; everything but letters separates words.
        vocabulary: the words by slot.
        fillers: words without a meaning.
        model: name of the model, for messages.

    Returns:
        The word of each slot that the prompt names.

    Raises:
        ValueError: a word is unknown, or two words name one slot.
    """
    slots: dict[str, str] = {}
    for word in re.findall(r"[a-z]+", prompt.lower()):
        slot = next((slot for slot, words in vocabulary.items() if word in words), None)
        if slot is None:
            if word in fillers:
                continue
            known = "; ".join(f"{slot}: {', '.join(words)}" for slot, words in vocabulary.items())
            raise ValueError(f"{model} does not know the word {word!r}; it knows {known}")
        if slot in slots:
            raise ValueError(f"the prompt names two words for {slot}, {slots[slot]!r} and {word!r}; name one")
        slots[slot] = word
    return slots


def table_rows(words: Sequence[Mapping[str, str | None]], vocabulary: Vocabulary) -> torch.Tensor:
    """Row of each word in its slot's table, 0 for a slot without a word: `[batch, slots]`, int64."""
    tables = {slot: (None, *known) for slot, known in vocabulary.items()}
    return torch.tensor([[rows.index(named.get(slot)) for slot, rows in tables.items()] for named in words])


class PromptTable(nn.Module):
    """A learned vector for every word, and one for each slot without a word: `[batch, slots, channels]`.

    Args:
        vocabulary: the words by slot.
        channels: length of a vector.
    """

    def __init__(self, vocabulary: Vocabulary, channels: int) -> None:
        super().__init__()
        self.vocabulary = dict(vocabulary)
        self.slots = nn.ModuleDict({slot: nn.Embedding(len(words) + 1, channels) for slot, words in vocabulary.items()})

    def indices(self, captions: Sequence[Any]) -> torch.Tensor:
        """Rows of captions, which have an attribute for each slot: `[batch, slots]`, int64."""
        return table_rows([vars(caption) for caption in captions], self.vocabulary)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Embed `indices` `[batch, slots]` as `[batch, slots, channels]`."""
        return torch.stack([table(indices[:, i]) for i, table in enumerate(self.slots.values())], dim=1)
