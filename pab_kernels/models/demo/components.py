"""The parts of the demo pipeline beside the transformer and the scheduler, which diffusers saves and loads."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from transformers import BatchEncoding, PreTrainedTokenizer

from .network import PromptTable
from .shapes import VOCABULARY, parse


class PixelDecoder(ModelMixin, ConfigMixin):
    """The VAE of a model on pixels: decoding is the identity."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0, block_out_channels: Sequence[int] = (1,)) -> None:
        super().__init__()  # one level of channels means no down-scaling
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # has the device and dtype

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return `latents`."""
        return latents

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        """`latents` as `.sample`."""
        return SimpleNamespace(sample=latents)


class PromptTokenizer(PreTrainedTokenizer):
    """Prompts as rows of the `PromptTable`: a number for every slot, without padding."""

    model_input_names = ["input_ids", "attention_mask"]

    def __call__(self, text: str | Sequence[str], *args: Any, **kwargs: Any) -> BatchEncoding:
        """`input_ids` `[batch, slots]` and a mask of ones; a ValueError for an unknown word."""
        captions = [parse(prompt) for prompt in ([text] if isinstance(text, str) else text)]
        indices = PromptTable.indices(captions)
        return BatchEncoding({"input_ids": indices, "attention_mask": torch.ones_like(indices)})

    def get_vocab(self) -> dict[str, int]:
        """The row of every word in the table of its slot."""
        return {word: i for words in VOCABULARY.values() for i, word in enumerate(words, 1)}

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return len(self.get_vocab())

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing is saved: the words come with the package."""
        return ()


class PromptEncoder(ModelMixin, ConfigMixin):
    """The `PromptTable` as a text encoder."""

    config_name = "config.json"

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.prompts = PromptTable()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        """Embed `input_ids` `[batch, slots]` as `[batch, slots, CAPTION_CHANNELS]`."""
        return (self.prompts(input_ids),)
