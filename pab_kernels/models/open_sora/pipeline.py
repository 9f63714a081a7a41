"""Open-Sora 1.2 as a pipeline in the manner of diffusers: prompts, given frames and loops to videos and images."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from . import text
from .given import MaskStep, mask_steps, place
from .guidance import CFG, Conditions, conditions, velocity
from .schedule import (
    CHUNK_FRAMES,
    CHUNK_LATENTS,
    IMAGE_FPS,
    PATCH_EDGE,
    VIDEO_FPS,
    bfloat16,
    latent_size,
    shift,
    sigmas,
)

OUTPUTS = ("pil", "np", "pt", "latent")
PARTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
_LIBRARIES = ("diffusers", "transformers", "pab_kernels")
"""Packages from which a saved pipeline's parts are imported; others must be imported already."""

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """What a call returns.

    Args:
        frames: `[B, F, 3, H, W]` in [0, 1] ("pt"), `[B, F, H, W, 3]` ("np"), a list of images for each clip ("pil"), or
            latents `[B, 4, T, H / 8, W / 8]` ("latent").
    """

    frames: Any


class OpenSoraPipeline(DiffusionPipeline):
    """Videos and images by Open-Sora 1.2.

        1. r = sqrt(H W / 512^2) sqrt(n); sigma_i = r u / (1 + (r - 1) u) at u = 1 - i / N    (`schedule`)
        2. v = v_null + g (v_text - v_null), with the transformer's velocity v, data minus noise
        3. z = z + v (sigma_i - sigma_(i + 1)), and sigma_N = 0

    The null text is the checkpoint's `y_embedder.y_embedding`, with the mask of the prompt.

    Args:
        transformer: an `STDiT3`.
        scheduler: default a `FlowMatchEulerDiscreteScheduler` of shift 1; one that takes `sigmas`.
        vae: an `OpenSoraVAE`, or another model with `encode(video, generator=)`, which returns latents or an object
            with `latent_dist`, and `decode(latents, num_frames=)`; None for `output_type="latent"`.
        text_encoder, tokenizer: T5 of transformers; None for `prompt_embeds`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["scheduler", "vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, transformer: Any, scheduler: Any = None, vae: Any = None, text_encoder: Any = None, tokenizer: Any = None
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler,
        )
        self.video_processor = VideoProcessor(vae_scale_factor=PATCH_EDGE)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        **parts: Any,
    ) -> OpenSoraPipeline:
        """Load what `save_pretrained` wrote.

        The published checkpoints are not in this form: load them one by one and pass them to the class.

        Args:
            name_or_path: a folder, or the id of a repository on the hub.
            dtype: of the models' weights.
            revision, cache_dir, token, local_files_only: of a hub id, as for `huggingface_hub.snapshot_download`.
            parts: arguments of the class, to take instead of what is saved.

        Raises:
            OSError: there is no such folder or repository.
            ValueError: a part is of a class that is not imported.
        """
        folder = name_or_path
        if not os.path.isdir(folder):
            folder = snapshot_download(
                str(folder), revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
            )
        for name, named in cls.load_config(folder).items():
            if name in PARTS and name not in parts and named[0] is not None:
                kind = _class_of(*named)
                typed = {"dtype": dtype} if issubclass(kind, nn.Module) and dtype is not None else {}
                parts[name] = kind.from_pretrained(folder, subfolder=name, **typed)
        return cls(**parts)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write every part to a folder of its name, and model_index.json.

        Args:
            save_directory: the folder, which is made if there is none.
        """
        for name, part in self.components.items():
            if part is not None:
                part.save_pretrained(Path(save_directory) / name)
        self.save_config(save_directory)

    # Sampling

    @property
    def guidance_scale(self) -> float:
        """g of the current call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the current clip."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep of the current step; None outside of a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the steps is left out; a callback sets it by `pipe._interrupt = True`."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        *,
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        clean_prompt: bool = True,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed prompts: the arguments `prompt_embeds` `[B, L, C]` and `prompt_attention_mask` `[B, L]` of a call.

        Raises:
            ValueError: the pipeline has no text encoder.
            ModuleNotFoundError: the packages for cleaning are not installed.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text_encoder and tokenizer; pass them to the class or prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        scored = [text.with_scores(p, aesthetic_score, motion_score, camera_motion) for p in prompts]
        ready = [text.cleaned(p) if clean_prompt else p.lower().strip() for p in scored]
        tokens = self.transformer.config["model_max_length"]
        return text.encode(ready, self.tokenizer, self.text_encoder, tokens, device or self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int = 51,
        height: int = 480,
        width: int = 854,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        fps: float | None = None,
        frames: Any = None,
        frame_latents: Tensor | None = None,
        frames_at: int = 0,
        frame_mask: Any = None,
        num_clips: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        clean_prompt: bool = True,
        cfg: str = "batched",
        round_sizes: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> OpenSoraPipelineOutput | tuple[Any]:
        """Sample videos, or with one frame images.

        Args:
            prompt: one or several texts; or `prompt_embeds`.
            num_frames: F of a clip: 1, or 17 or more; multiples of 17 (51 are 2 s) in training.
            height, width: H and W in pixels; results are cut to multiples of 8.
            num_inference_steps: N.
            guidance_scale: g; without guidance at 1.
            fps: frames a second that the model is told; default 24, and 120 for an image.
            frames: given frames: an image, a list of images, a tensor `[B, F, 3, H, W]` in [0, 1], or whatever
                else diffusers' `VideoProcessor` takes; resized to H x W, images with their sides cropped. One frame
                is one latent frame, 17 frames are 5.
            frame_latents: given frames as latents `[B or 1, 4, t, h, w]`, instead of `frames`.
            frames_at: the latent frame at which the given ones begin; negative values count from the end.
            frame_mask: for every latent frame, `[T]` or `[B, T]`: 1 for free, 0 for given, an edit ratio in between
                (see `given`); default 0 for the given frames and 1 for all others.
            num_clips: how many clips to sample one after the other; each but the first is given the last 5 latent
                frames of the one before as its first ones. The result is one video without the repeated frames. More
                than one needs a multiple of 17 frames: these 5 are then one chunk of the VAE.
            generator: of the noise, one or one for each clip of the batch.
            latents: the noise of the first clip `[B, 4, T, H / 8, W / 8]`.
            prompt_embeds: text `[B, L, C]` or `[B, 1, L, C]`, L up to 300, from `encode_prompt` or
                `text.read_embeddings`.
            prompt_attention_mask: `[B, L]`, nonzero for text; default all ones.
            aesthetic_score, motion_score, camera_motion: appended to prompts that do not name them.
            clean_prompt: whether prompts are cleaned as in training; needs ftfy and beautifulsoup4.
            cfg: "batched", one call of the transformer for both branches of guidance, text first; or "apart", two
                calls, in the contexts "cond" and "uncond".
            round_sizes: whether sizes are rounded to bfloat16, as in the original's bfloat16 sampling (854 to 856).
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return an `OpenSoraPipelineOutput`, or a tuple.
            callback_on_step_end: called as `f(pipe, step, timestep, {"latents": ...})` after every step of a clip; may
                return other latents.
            callback_on_step_end_tensor_inputs: what it is given.

        Raises:
            ValueError: arguments do not fit each other or the parts of the pipeline.
            ModuleNotFoundError: the packages for cleaning prompts are not installed.
        """
        size = latent_size(num_frames, height, width)
        self._check(prompt, prompt_embeds, frames, frame_latents, frame_mask, output_type)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if cfg not in CFG:
            raise ValueError(f"cfg must be one of {', '.join(CFG)}, got {cfg!r}")
        if num_clips < 1 or (num_clips > 1 and (num_frames % CHUNK_FRAMES or num_frames == CHUNK_FRAMES)):
            raise ValueError(
                f"got num_clips={num_clips} with {num_frames} frames; 1, or with {2 * CHUNK_FRAMES}, "
                f"{3 * CHUNK_FRAMES}, ... frames any number is supported"
            )
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks are given {self._callback_tensor_inputs}, got {sorted(unknown)}")
        self._guidance_scale, self._interrupt, self._current_timestep = guidance_scale, False, None
        self._num_timesteps = num_inference_steps
        device = self._execution_device
        if prompt_embeds is None:
            assert prompt is not None
            prompt_embeds, prompt_attention_mask = self.encode_prompt(
                prompt,
                aesthetic_score=aesthetic_score,
                motion_score=motion_score,
                camera_motion=camera_motion,
                clean_prompt=clean_prompt,
                device=device,
            )
        rate = fps if fps is not None else IMAGE_FPS if num_frames == 1 else VIDEO_FPS
        sizes = [bfloat16(v) if round_sizes else v for v in (rate, height, width)]
        told = conditions(self.transformer, prompt_embeds, prompt_attention_mask, device, *sizes)
        levels = sigmas(num_inference_steps, shift(num_frames, height, width, rounded=round_sizes))
        if isinstance(generator, list) and len(generator) != len(told.text):
            raise ValueError(f"got {len(generator)} generators for {len(told.text)} clips; one, or one for each")
        shape = (len(told.text), self.transformer.config["in_channels"], *size)
        given = frame_latents
        if frames is not None:
            given = self.prepare_frames(frames, size.height, size.width, generator)
        clips: list[Tensor] = []
        for clip in range(num_clips):
            if self.interrupt:
                break
            if clip > 0:
                given, frames_at, frame_mask, latents = clips[-1][:, :, -CHUNK_LATENTS:], 0, None, None
            noise = self.prepare_latents(shape, generator, device, latents)
            mask = None
            if given is not None:
                noise, mask = place(noise, given, frames_at, frame_mask)
            clips.append(
                self._sample(
                    noise, mask, levels, told, generator, cfg, callback_on_step_end, callback_on_step_end_tensor_inputs
                )
            )
        if output_type == "latent":
            found: Any = torch.cat([clips[0], *(clip[:, :, CHUNK_LATENTS:] for clip in clips[1:])], 2)
        else:
            videos = [self._decoded(clip, num_frames) for clip in clips]
            video = torch.cat([videos[0], *(video[:, :, CHUNK_FRAMES:] for video in videos[1:])], 2)
            found = self.video_processor.postprocess_video(video, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(found) if return_dict else (found,)

    def _sample(
        self,
        latents: Tensor,
        mask: Tensor | None,
        levels: Sequence[float],
        told: Conditions,
        generator: Generators,
        cfg: str,
        callback: Callable[..., dict[str, Any]] | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """The latents of one clip `[B, C, T, h, w]`, float32.

        Args:
            latents: noise, and given frames where `mask` has less than 1.
            mask: `[B, T]` on the CPU; None if no frame is given.
            levels: the noise level of every step.
            told: the conditions.
            generator, cfg, callback, callback_inputs: as in a call.
        """
        device = latents.device
        if (given := self.scheduler.config.get("shift", 1.0)) != 1.0:
            raise ValueError(
                f"the scheduler has shift {given}, and Open-Sora's noise levels are shifted by size already; use "
                f"{type(self.scheduler).__name__} with shift 1"
            )
        self.scheduler.set_timesteps(sigmas=list(levels), device=device)
        self.scheduler.set_begin_index(0)  # else its first step would read a timestep from the device
        masks: Sequence[MaskStep | None] = [None] * len(levels) if mask is None else mask_steps(mask, levels, device)
        with self.progress_bar(total=len(levels)) as bar:
            for i, (t, level, step) in enumerate(zip(self.scheduler.timesteps, levels, masks, strict=True)):
                if self.interrupt:
                    continue
                self._current_timestep = t
                if step is not None and step.noised is not None:
                    noise = self.prepare_latents(latents.shape, generator, device)
                    latents = torch.where(step.noised, level * noise + (1 - level) * latents, latents)
                free = None if step is None else step.free
                v = velocity(self.transformer, latents, t, told, self.guidance_scale, cfg, free)
                if free is not None:
                    v = v.where(free[:, None, :, None, None], 0)
                latents = self.scheduler.step(-v, t, latents, return_dict=False)[0]
                if callback is not None:
                    changed = callback(self, i, t, dict.fromkeys(callback_inputs, latents))
                    latents = (changed or {}).pop("latents", latents)
                bar.update()
        self._current_timestep = None
        return latents

    def prepare_latents(
        self, shape: Sequence[int], generator: Generators, device: torch.device, latents: Tensor | None = None
    ) -> Tensor:
        """Noise in the dtype of the transformer, as float32, which every step returns.

        Args:
            shape: `[B, 4, T, h, w]`.
            generator: of the noise, one or one for each clip of the batch.
            device: of the noise.
            latents: noise to take instead.

        Raises:
            ValueError: `latents` has another shape.
        """
        if latents is None:
            latents = randn_tensor(tuple(shape), generator=generator, device=device, dtype=self.transformer.dtype)
        elif latents.shape != tuple(shape):
            raise ValueError(f"latents have shape {list(latents.shape)}; for this size it must be {list(shape)}")
        return latents.to(device, torch.float32)

    def prepare_frames(self, frames: Any, height: int, width: int, generator: Generators) -> Tensor:
        """Latents `[B, 4, t, height, width]` of given frames.

        Args:
            frames: as in a call.
            height, width: of the latents.
            generator: of the VAE's noise; each clip of a batch has its own, if there are several.
        """
        cropped = {"resize_mode": "crop"} if _has_pictures(frames) else {}
        video = self.video_processor.preprocess_video(
            frames if not hasattr(frames, "convert") else [frames], height * PATCH_EDGE, width * PATCH_EDGE, **cropped
        ).to(self._execution_device, self.vae.dtype)
        latents = []
        for i, clip in enumerate(video):
            own = generator[i] if isinstance(generator, list) else generator
            found = self.vae.encode(clip[None], generator=own)
            latents.append(found.latent_dist.sample(own) if hasattr(found, "latent_dist") else found)
        return torch.cat(latents)

    def _decoded(self, latents: Tensor, num_frames: int) -> Tensor:
        """`[B, 3, F, H, W]`, float32 in [-1, 1]."""
        found = self.vae.decode(latents.to(self.vae.dtype), num_frames=num_frames)
        return getattr(found, "sample", found).float()

    def _check(
        self, prompt: Any, embeds: Any, frames: Any, frame_latents: Any, frame_mask: Any, output_type: str
    ) -> None:
        if (prompt is None) == (embeds is None):
            raise ValueError("pass either prompt or prompt_embeds")
        if frames is not None and frame_latents is not None:
            raise ValueError("pass either frames or frame_latents")
        if frame_mask is not None and frames is None and frame_latents is None:
            raise ValueError("frame_mask says which frames are given; pass them as frames or frame_latents")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
        if self.vae is None and (frames is not None or output_type != "latent"):
            raise ValueError(
                'this pipeline has no vae; pass it to the class, or frame_latents and output_type="latent"'
            )


def _class_of(library: str, name: str) -> Any:
    """The class of a saved part; see `_LIBRARIES`."""
    if library.partition(".")[0] in _LIBRARIES:
        return getattr(importlib.import_module(library), name)
    if library not in sys.modules:
        raise ValueError(f"a part of this pipeline is a {library}.{name}; import {library} before loading it")
    return getattr(sys.modules[library], name)


def _has_pictures(frames: Any) -> bool:
    """Whether given frames are images of PIL."""
    while isinstance(frames, list) and frames:
        frames = frames[0]
    return hasattr(frames, "convert")
