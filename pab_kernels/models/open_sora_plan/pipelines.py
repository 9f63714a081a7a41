"""Open-Sora-Plan from a prompt to a video: pipelines of diffusers with what differs in 1.1 and 1.2.

| | 1.1 | 1.2 |
|---|---|---|
| pipeline of diffusers | LattePipeline | AllegroPipeline |
| scheduler, steps | PNDM, 150 | Euler ancestral, 100 |
| text | T5 v1.1 XXL, 300 tokens, cut to those of the prompt | mT5 XXL, 512 tokens with their mask |
| frames | 65 or 221 | 29 or 93 |
| guidance | 7.5 | 7.5 |

Both decode by `CausalVAE`: F frames have 1 + (F - 1) / 4 latent ones.

Source: PKU-YuanGroup/Open-Sora-Plan, tags v1.1.0 and v1.2.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LattePipeline,
    PNDMScheduler,
)
from diffusers.video_processor import VideoProcessor

from . import causal_vae  # noqa: F401  diffusers loads saved parts only of classes that are imported
from .transformers import with_positions

PIXELS, TIME = 8, 4
"""Pixels and frames of a latent."""
TOKENS = 300
"""Of a prompt in 1.1."""


def latent_frames(frames: int) -> int:
    """The latent frames of a number of frames.

    Raises:
        ValueError: it is not 1 more than a multiple of 4.
    """
    if frames < 1 or (frames - 1) % TIME:
        raise ValueError(f"num_frames must be 1 more than a multiple of {TIME}, got {frames}; such as 29, 65, 93, 221")
    return 1 + (frames - 1) // TIME


def _decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Frames `[B, 3, F, H, W]` in [-1, 1], float32."""
    scaled = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
    frames: torch.Tensor = pipe.vae.decode(scaled).sample
    return frames.float()


class OpenSoraPlan11Pipeline(LattePipeline):
    """Open-Sora-Plan 1.1: `LattePipeline` with 300 tokens of text and a video autoencoder.

    Args:
        tokenizer, text_encoder: of T5 v1.1 XXL; None if embeddings are given.
        vae: its autoencoder.
        transformer: see `load_transformer`; it gets the `with_positions` of 1.1.
        scheduler: `PNDMScheduler()`, or another one of diffusers.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=with_positions(transformer),  # diffusers does not save them
            scheduler=scheduler,
        )
        self.vae_scale_factor = PIXELS
        self.video_processor = VideoProcessor(vae_scale_factor=PIXELS)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] = "",
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        clean_caption: bool = False,
        mask_feature: bool = True,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings `[B, L, 4096]` of prompts and of negative prompts.

        One prompt is cut to its L tokens, and the negative one to as many; several keep 300, those beyond their own
        are zeros. The transformer gets no mask.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
            prompt_embeds, mask = self._encoded(prompts, device, clean_caption)
            if mask_feature:
                kept = int(mask.sum()) if len(prompts) == 1 else TOKENS
                prompt_embeds = (prompt_embeds * mask[..., None])[:, :kept]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = [negative_prompt] * len(prompt_embeds) if isinstance(negative_prompt, str) else negative_prompt
            negative_prompt_embeds, _ = self._encoded(negatives, device, clean_caption)
            negative_prompt_embeds = negative_prompt_embeds[:, : prompt_embeds.shape[1]]
        dtype = dtype or self.transformer.dtype

        def placed(embeds: torch.Tensor) -> torch.Tensor:
            return embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)

        negative = placed(negative_prompt_embeds) if do_classifier_free_guidance else None  # type: ignore[arg-type]
        return placed(prompt_embeds), negative

    def _encoded(self, texts: list[str], device: torch.device, clean: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(
            self._text_preprocessing(texts, clean_caption=clean),
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        return self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask

    def decode_latents(self, latents: torch.Tensor, video_length: int, decode_chunk_size: int = 14) -> torch.Tensor:
        """Frames `[B, 3, F, H, W]` in [-1, 1]; the sizes of chunks are the autoencoder's."""
        return _decoded(self, latents)

    def __call__(  # fewer arguments than LattePipeline: `num_frames` for `video_length`
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str = "",
        num_inference_steps: int = 150,
        timesteps: list[int] | None = None,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        clean_caption: bool = True,
    ) -> Any:
        """Sample videos.

        Args:
            num_frames: of the model, 65 or 221.
            height, width: in pixels; default as trained, 512.
            prompt, negative_prompt, num_inference_steps, timesteps, guidance_scale, num_images_per_prompt, eta,
                generator, latents, prompt_embeds, negative_prompt_embeds, output_type, return_dict,
                callback_on_step_end, callback_on_step_end_tensor_inputs, clean_caption: as for `LattePipeline`.

        Returns:
            A `LattePipelineOutput` with `frames`, or a tuple.

        Raises:
            ValueError: an argument is not supported.
        """
        length = self.transformer.config.video_length
        if num_frames is not None and latent_frames(num_frames) != length:
            most = TIME * (length - 1) + 1
            raise ValueError(f"this model was trained for {most} frames, and has positions for them; got {num_frames}")
        return super().__call__(
            prompt,
            negative_prompt,
            num_inference_steps,
            timesteps,
            guidance_scale,
            num_images_per_prompt,
            length,
            height,
            width,
            eta,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs or ["latents"],
            clean_caption,
        )


class OpenSoraPlan12Pipeline(AllegroPipeline):
    """Open-Sora-Plan 1.2: `AllegroPipeline` with its autoencoder.

    Args:
        tokenizer, text_encoder: of mT5 XXL.
        vae: its autoencoder.
        transformer: see `load_transformer`.
        scheduler: `EulerAncestralDiscreteScheduler()`, or another one of diffusers.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor_spatial, self.vae_scale_factor_temporal = PIXELS, TIME
        self.video_processor = VideoProcessor(vae_scale_factor=PIXELS)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames `[B, 3, F, H, W]` in [-1, 1]."""
        return _decoded(self, latents)


def version_11(**parts: Any) -> OpenSoraPlan11Pipeline:
    """The pipeline of 1.1 with its scheduler."""
    return OpenSoraPlan11Pipeline(**parts, scheduler=PNDMScheduler())


def version_12(**parts: Any) -> OpenSoraPlan12Pipeline:
    """The pipeline of 1.2 with its scheduler."""
    return OpenSoraPlan12Pipeline(**parts, scheduler=EulerAncestralDiscreteScheduler())
