"""How each class of transformer is called at a clip size: latents, text, calls a step, timesteps; on meta tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...models.open_sora import schedule as open_sora
from ...rules.traffic import Method

Config = Mapping[str, Any]


class Size(NamedTuple):
    """Frames, height and width, of a clip in pixels or of its latents."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


Tensors = Callable[[Config, int, Size, int, torch.dtype], dict[str, Any]]
"""The arguments of `forward`; see `ModelCall`."""


@dataclass(frozen=True)
class ModelCall:
    """How the pipelines of one class of transformer call it.

    Args:
        latents: the size of the latents, from a config and the clip size.
        tensors: the arguments of `forward`, from a config, the batch, the size of the latents, the tokens of the text
            and the model's dtype.
        timesteps: from a number of steps, the size of the latents and the clip size.
        text: tokens of the prompt, including padding.
        batch: batch of a call for each clip: 2 with batched classifier-free guidance.
        contexts: calls in a step: 2 if each branch of the guidance has its own.
        split: what several ranks split the stream in; see `rules/traffic.py`.
        joint_text: whether text takes part in self attention.
    """

    latents: Callable[[Config, Size], Size]
    tensors: Tensors
    timesteps: Callable[[int, Size, Size], tuple[float, ...]]
    text: int
    batch: int = 1
    contexts: int = 1
    split: Method = "tokens"
    joint_text: bool = False


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# Latents


def compressed(frames: int, pixels: int) -> Callable[[Config, Size], Size]:
    """Latents of a VAE with one latent frame for the first frame and one for every `frames` further frames.

    Args:
        frames: compression in time.
        pixels: compression in height and width.

    Returns:
        The field `latents` of a `ModelCall`; it raises a ValueError if patches do not fit the latents.
    """

    def latents(config: Config, clip: Size) -> Size:
        patch = config.get("patch_size", 1)
        p_t, p_h, p_w = patch if isinstance(patch, (tuple, list)) else (config.get("patch_size_t") or 1, patch, patch)
        size = Size((clip.frames - 1) // frames + 1, clip.height // pixels, clip.width // pixels)
        if (clip.frames - 1) % frames or size.frames % p_t:
            step = frames * p_t
            first = 1 + frames * (p_t - 1)
            supported = f"{first}, {first + step}, {first + 2 * step}, ... are supported"
            raise ValueError(f"size {clip}: {clip.frames} frames do not fit; {supported}")
        for name, length, multiple in (("height", clip.height, pixels * p_h), ("width", clip.width, pixels * p_w)):
            if length % multiple:
                raise ValueError(f"size {clip}: {name} {length} does not fit; multiples of {multiple} are supported")
        return size

    return latents


def _latte_latents(config: Config, clip: Size) -> Size:
    if clip.frames != config["video_length"]:
        raise ValueError(f"size {clip}: {clip.frames} frames do not fit; this model has {config['video_length']}")
    return compressed(1, 8)({"patch_size": (1, config["patch_size"], config["patch_size"])}, clip)


def _latte_t2v_latents(config: Config, clip: Size) -> Size:
    """Open-Sora-Plan 1.1's, whose config has the number of latent frames."""
    found = compressed(4, 8)(config, clip)
    if found.frames != config["video_length"]:
        frames = 4 * config["video_length"] - 3
        raise ValueError(f"size {clip}: {clip.frames} frames do not fit; this model has {frames}")
    return found


def _flux_latents(config: Config, clip: Size) -> Size:
    if clip.frames != 1:
        supported = f"this model generates images: 1x{clip.height}x{clip.width}"
        raise ValueError(f"size {clip}: {clip.frames} frames do not fit; {supported}")
    return compressed(1, 8)({"patch_size": 2}, clip)


def _open_sora_latents(config: Config, clip: Size) -> Size:
    """Open-Sora 1.2's VAE: 17 frames are 5 latent frames; height and width are rounded down, and patches padded."""
    if clip.frames != 1 and clip.frames % 17:
        supported = "1 and multiples of 17 are supported (51 are 2 s)"
        raise ValueError(f"size {clip}: {clip.frames} frames do not fit; {supported}")
    return Size(*open_sora.latent_size(*clip))


# Arguments of `forward`


def _video(text_channels: str) -> Tensors:
    """Latents with channels first, a timestep for each clip, and text with `config[text_channels]` channels."""

    def tensors(config: Config, batch: int, latents: Size, text: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": _meta(batch, config["in_channels"], *latents, dtype=dtype),
            "timestep": _meta(batch, dtype=torch.int64),
            "encoder_hidden_states": _meta(batch, text, config[text_channels], dtype=dtype),
        }

    return tensors


def _cogvideox(config: Config, batch: int, latents: Size, text: int, dtype: torch.dtype) -> dict[str, Any]:
    t, h, w = latents
    found: dict[str, Any] = {
        "hidden_states": _meta(batch, t, config["in_channels"], h, w, dtype=dtype),
        "encoder_hidden_states": _meta(batch, text, config["text_embed_dim"], dtype=dtype),
        "timestep": _meta(batch, dtype=torch.int64),
    }
    if config["use_rotary_positional_embeddings"]:
        patch = config["patch_size"]
        tokens = t // (config["patch_size_t"] or 1) * (h // patch) * (w // patch)
        found["image_rotary_emb"] = (_meta(tokens, config["attention_head_dim"], dtype=torch.float32),) * 2
    return found


def _hunyuan(config: Config, batch: int, latents: Size, text: int, dtype: torch.dtype) -> dict[str, Any]:
    return _video("text_embed_dim")(config, batch, latents, text, dtype) | {
        "encoder_attention_mask": _meta(batch, text, dtype=torch.int64),
        "pooled_projections": _meta(batch, config["pooled_projection_dim"], dtype=dtype),
        "guidance": _meta(batch, dtype=dtype) if config["guidance_embeds"] else None,
    }


def _ltx(config: Config, batch: int, latents: Size, text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _meta(batch, math.prod(latents), config["in_channels"], dtype=dtype),
        "encoder_hidden_states": _meta(batch, text, config["caption_channels"], dtype=dtype),
        "timestep": _meta(batch, dtype=torch.float32),
        "encoder_attention_mask": _meta(batch, text, dtype=torch.int64),
        "num_frames": latents.frames,
        "height": latents.height,
        "width": latents.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _flux(config: Config, batch: int, latents: Size, text: int, dtype: torch.dtype) -> dict[str, Any]:
    tokens = latents.height // 2 * (latents.width // 2)
    return {
        "hidden_states": _meta(batch, tokens, config["in_channels"], dtype=dtype),
        "encoder_hidden_states": _meta(batch, text, config["joint_attention_dim"], dtype=dtype),
        "pooled_projections": _meta(batch, config["pooled_projection_dim"], dtype=dtype),
        "timestep": _meta(batch, dtype=dtype),
        "img_ids": _meta(tokens, 3, dtype=dtype),
        "txt_ids": _meta(text, 3, dtype=dtype),
        "guidance": _meta(batch, dtype=torch.float32) if config["guidance_embeds"] else None,
    }


def _stdit3(config: Config, batch: int, latents: Size, text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": _meta(batch, config["in_channels"], *latents, dtype=dtype),
        "timestep": _meta(batch, dtype=torch.float32),
        "y": _meta(batch, 1, text, config["caption_channels"], dtype=dtype),
        "mask": _meta(batch, text, dtype=torch.int64),
        "fps": _meta(1, dtype=torch.float32),
        "height": _meta(1, dtype=torch.float32),
        "width": _meta(1, dtype=torch.float32),
    }


def _open_sora_plan(config: Config, batch: int, latents: Size, text: int, dtype: torch.dtype) -> dict[str, Any]:
    t, h, w = latents.frames, latents.height // config["patch_size"], latents.width // config["patch_size"]
    part = config["attention_head_dim"] // 3
    tables = tuple((_meta(n, part, dtype=torch.float32),) * 2 for n in (t, h, w))
    places = (_meta(1, t * h * w, dtype=torch.int64),) * 3
    return {
        "hidden_states": _meta(batch, config["in_channels"], *latents, dtype=dtype),
        "encoder_hidden_states": _meta(batch, 1, text, config["caption_channels"], dtype=dtype),
        "timestep": _meta(batch, dtype=torch.float32),
        "encoder_attention_mask": _meta(batch, text, dtype=torch.int64),
        "image_rotary_emb": (tables, places),
    }


# Timesteps

TRAINED = 1000
"""Number of timesteps in training."""


def _check_steps(steps: int) -> None:
    if steps > TRAINED:
        raise ValueError(f"this model's scheduler has at most {TRAINED} steps, got {steps}")


def leading(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    """Timesteps of a DDIM scheduler with spacing "leading": `i * (1000 // N)`, descending."""
    _check_steps(steps)
    return tuple(float(i * (TRAINED // steps)) for i in reversed(range(steps)))


def pndm(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    """Timesteps of a PNDM scheduler with its defaults: of N steps, the first three are Runge-Kutta steps of four calls
    each, so that there are N + 9."""
    _check_steps(steps)
    if steps < 4:
        raise ValueError(f"PNDM takes at least 4 steps, got {steps}")
    ratio = TRAINED // steps
    first = [steps - 1 - i for i in range(4)]
    calls = [
        float(t)
        for a, b in itertools.pairwise(first)
        for t in (a * ratio, (a * ratio + b * ratio) // 2, (a * ratio + b * ratio) // 2, b * ratio)
    ]
    return (*calls, *(float(i * ratio) for i in reversed(range(steps - 3))))


def _ancestral(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    """Timesteps of an ancestral Euler scheduler with its defaults: N from 999 down to 0, evenly."""
    _check_steps(steps)
    return tuple(999.0 * i / max(steps - 1, 1) for i in reversed(range(steps)))


def trailing(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    """Timesteps of a DDIM scheduler with spacing "trailing": `round(1000 - i * 1000 / N) - 1`."""
    _check_steps(steps)
    return tuple(float(round(TRAINED - i * TRAINED / steps) - 1) for i in range(steps))


def _shifted(sigma: float, shift: float) -> float:
    """`s t / (1 + (s - 1) t)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _flow(steps: int, shift: float) -> list[float]:
    """Sigmas of flow matching: N from 1 down to 1 / N, shifted."""
    return [_shifted(1 - i * (1 - 1 / steps) / max(steps - 1, 1), shift) for i in range(steps)]


def _hunyuan_timesteps(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    return tuple(1000 * sigma for sigma in _flow(steps, 7.0))


def _unipc(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    """Timesteps of UniPC on flow matching with shift 3, as in Wan 2.1's pipelines: whole numbers."""
    _check_steps(steps)
    return tuple(float(min(999, int(1000 * _shifted(1 - i * 0.999 / steps, 3.0)))) for i in range(steps))


def _dynamic(tokens: int, lo: int, hi: int, low: float, high: float) -> float:
    """The shift `exp(mu)` for a number of tokens, with mu on the line through (lo, low) and (hi, high)."""
    return math.exp(low + (tokens - lo) * (high - low) / (hi - lo))


def _flux_timesteps(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    shift = _dynamic(latents.height // 2 * (latents.width // 2), 256, 4096, 0.5, 1.15)
    return tuple(1000 * sigma for sigma in _flow(steps, shift))


def _ltx_timesteps(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    """Shifted by the number of tokens, then stretched so that the last is 100."""
    sigmas = _flow(steps, _dynamic(math.prod(latents), 1024, 4096, 0.95, 2.05))
    stretch = (1 - sigmas[-1]) / 0.9
    return tuple(1000 * (1 - (1 - sigma) / stretch) if stretch else 1000.0 for sigma in sigmas)


def _open_sora_timesteps(steps: int, latents: Size, clip: Size) -> tuple[float, ...]:
    return tuple(1000 * sigma for sigma in open_sora.sigmas(steps, open_sora.shift(*clip)))


MODEL_CALLS = {
    "LatteTransformer3DModel": ModelCall(
        _latte_latents, _video("caption_channels"), leading, text=120, batch=2, split="frames"
    ),
    "CogVideoXTransformer3DModel": ModelCall(
        compressed(4, 8), _cogvideox, trailing, text=226, batch=2, joint_text=True
    ),
    "WanTransformer3DModel": ModelCall(compressed(4, 8), _video("text_dim"), _unipc, text=512, contexts=2),
    "HunyuanVideoTransformer3DModel": ModelCall(
        compressed(4, 8), _hunyuan, _hunyuan_timesteps, text=256, joint_text=True
    ),
    "LTXVideoTransformer3DModel": ModelCall(compressed(8, 32), _ltx, _ltx_timesteps, text=128, batch=2),
    "FluxTransformer2DModel": ModelCall(_flux_latents, _flux, _flux_timesteps, text=512, joint_text=True),
    "STDiT3": ModelCall(_open_sora_latents, _stdit3, _open_sora_timesteps, text=300, batch=2, split="frames"),
    "LatteT2V": ModelCall(_latte_t2v_latents, _video("caption_channels"), pndm, text=300, batch=2, split="frames"),
    "OpenSoraT2V": ModelCall(compressed(4, 8), _open_sora_plan, _ancestral, text=512, batch=2),
}
"""By class. Text, guidance and timesteps are the defaults of the classes' text-to-video pipelines in diffusers, for
STDiT3 those of Open-Sora 1.2's `configs/opensora-v1-2/inference/sample.py`, and for the classes of Open-Sora-Plan those
of `models/open_sora_plan`."""
