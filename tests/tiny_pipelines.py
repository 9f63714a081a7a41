"""Whole diffusers pipelines, tiny and with random weights: what is saved to a folder and used as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from tests.adapters.tiny_latte import TEXT_CHANNELS, tiny_latte

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "right")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def text_encoder(channels: int, kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    return kind(config(vocab_size=len(WORDS), d_model=channels, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()


def image_vae(levels: int) -> AutoencoderKL:
    """Scales by 2 at every level but the first."""
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )


def latte() -> LattePipeline:
    """Videos of 4 frames, 32 x 32."""
    return LattePipeline(
        tokenizer(), text_encoder(TEXT_CHANNELS), image_vae(2), tiny_latte(), DDIMScheduler(clip_sample=False)
    )


def cogvideox() -> CogVideoXPipeline:
    """Videos of 5 frames, 16 x 16, with a scheduler that hands on its last prediction."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=5,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(tokenizer(), text_encoder(16), vae, transformer, CogVideoXDDIMScheduler())


def wan() -> WanPipeline:
    """Videos of 5 frames, 16 x 16; separate calls for the two branches of guidance, named by `cache_context`."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    encoder = text_encoder(16, UMT5EncoderModel, UMT5Config)
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
    )


def pixart() -> PixArtSigmaPipeline:
    """Images of 256 x 256, which it insists on; the older kind of callback."""
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    )
    return PixArtSigmaPipeline(tokenizer(), text_encoder(16), image_vae(4), transformer, DPMSolverMultistepScheduler())


PIPELINES: dict[str, tuple[Callable[[], Any], str]] = {
    "latte": (latte, "4x32x32"),
    "cogvideox": (cogvideox, "5x16x16"),
    "wan": (wan, "5x16x16"),
    "pixart": (pixart, "256x256"),
}
"""How each is made, and the size of what it draws."""


def save(name: str, folder: Any) -> None:
    """Save a pipeline whose weights are the same each time and large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PIPELINES[name][0]().save_pretrained(folder)
