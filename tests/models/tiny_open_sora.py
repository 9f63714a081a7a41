"""A tiny Open-Sora pipeline with random weights: STDiT3, T5, and a stand-in for the VAE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from pab_kernels.models.open_sora.pipeline import OpenSoraPipeline
from pab_kernels.models.stdit3 import STDiT3
from tests.adapters.tiny_stdit3 import tiny_stdit3
from tests.tiny_pipelines import text_encoder, tokenizer

TEXT, TOKENS = 24, 7
"""Channels of the text, and tokens of a prompt."""
CLIP = {"num_frames": 17, "height": 32, "width": 40}
"""A clip of 5 latent frames of 4 x 5."""


def one_layer(**config: Any) -> STDiT3:
    """A transformer of one spatial and one temporal block; `config` overrides this."""
    return tiny_stdit3(seed=1, **{"depth": 1, "caption_channels": TEXT, "model_max_length": TOKENS} | config)


class TinyVAE(ModelMixin, ConfigMixin):
    """Means of 8 x 8 pixels and of up to 4 frames, independently for every 17 frames; the fourth channel is the mean
    of the colours. Decoding repeats them."""

    config_name = "config.json"

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # has the device and dtype

    @staticmethod
    def places(frames: int) -> list[int]:
        """The latent frame of each frame; the shorter group of a chunk is its first."""
        chunks = [17] * (frames // 17) + [frames % 17] * (frames % 17 > 0)
        found: list[int] = []
        for n in chunks:
            first = found[-1] + 1 if found else 0
            found += [first + (i + -n % 4) // 4 for i in range(n)]
        return found

    def encode(self, video: Tensor, generator: Any = None) -> SimpleNamespace:
        pixels = nn.functional.avg_pool3d(video, (1, 8, 8))
        places = torch.tensor(self.places(video.shape[2]))
        groups = [pixels[:, :, places == i].mean(2) for i in range(int(places.max()) + 1)]
        latents = torch.stack(groups, 2)
        latents = torch.cat([latents, latents.mean(1, keepdim=True)], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: latents))

    def decode(self, latents: Tensor, num_frames: int) -> SimpleNamespace:
        video = latents[:, :3, self.places(num_frames)]
        return SimpleNamespace(sample=video.repeat_interleave(8, 3).repeat_interleave(8, 4))


def tiny_pipe(**config: Any) -> OpenSoraPipeline:
    """The pipeline; `config` is of the STDiT3."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        encoder = text_encoder(TEXT).requires_grad_(False)
    pipe = OpenSoraPipeline(one_layer(**config), vae=TinyVAE(), text_encoder=encoder, tokenizer=tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(lengths: tuple[int, ...] = (4, 7)) -> dict[str, Tensor]:
    """Embeddings of prompts with so many tokens, and their mask."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    embeds = torch.randn(len(lengths), TOKENS, TEXT, generator=generator)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask.long()}


def noise(batch: int = 2, frames: int = 5, seed: int = 4) -> Tensor:
    """Latents of `CLIP`."""
    return torch.randn(batch, 4, frames, 4, 5, generator=torch.Generator().manual_seed(seed))
