"""Tokenizer and text encoder on a `PromptTable`, which diffusers saves and loads with a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.modeling_outputs import BaseModelOutput

from .prompts import PromptTable, parse_words, table_rows

Slots = Sequence[tuple[str, Sequence[str]]]
"""A vocabulary as pairs of a slot and its words: a saved config sorts the keys of a dict."""


class PromptTokenizer(PreTrainedTokenizer):
    """Prompts as rows of a `PromptTable`: a number for every slot, without padding.

    Args:
        slots: the words by slot.
        fillers: words without a meaning.
        model: name of the model, for messages.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, slots: Slots, fillers: Sequence[str], model: str, **options: Any) -> None:
        self.vocabulary, self.fillers, self.model = dict(slots), fillers, model
        super().__init__(slots=slots, fillers=fillers, model=model, **options)

    def __call__(self, text: str | Sequence[str], *args: Any, **kwargs: Any) -> BatchEncoding:
        """`input_ids` `[batch, slots]` and a mask of ones; a ValueError for an unknown word."""
        prompts = [text] if isinstance(text, str) else text
        named = [parse_words(prompt, self.vocabulary, self.fillers, self.model) for prompt in prompts]
        indices = table_rows(named, self.vocabulary)
        return BatchEncoding({"input_ids": indices, "attention_mask": torch.ones_like(indices)})

    def get_vocab(self) -> dict[str, int]:
        """The row of every word in the table of its slot."""
        return {word: i for words in self.vocabulary.values() for i, word in enumerate(words, 1)}

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return len(self.get_vocab())

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing is saved: the config has the words."""
        return ()


class PromptEncoder(ModelMixin, ConfigMixin):
    """A `PromptTable` as a text encoder.

    Args:
        slots: the words by slot.
        channels: length of a vector.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, slots: Slots, channels: int) -> None:
        super().__init__()
        self.prompts = PromptTable(dict(slots), channels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        """Embed `input_ids` `[batch, slots]` as `last_hidden_state` `[batch, slots, channels]`."""
        return BaseModelOutput(last_hidden_state=self.prompts(input_ids))
