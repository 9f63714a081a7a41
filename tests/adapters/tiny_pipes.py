"""Tiny real pipelines of diffusers around tiny transformers: real schedulers, random weights, prompts as embeddings,
latents as output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.adapters.classes import RUN
from tests.adapters.tiny_latte import TEXT_CHANNELS, tiny_latte
from tests.adapters.tiny_models import TEXT, Tiny

_CONFIGS = {tiny.name: tiny.config for tiny in RUN}


def transformer(name: str, **config: Any) -> Any:
    """A tiny transformer of the class `name`; `config` overrides what the tests of single models use."""
    return Tiny(name, _CONFIGS[name] | config, lambda _: {}, {}).build()


def embedding(seed: int, *shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def prompts(
    channels: int, mask: Callable[[], Tensor] | None = None, name: str = "prompt_attention_mask", **pooled: int
) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one, and what goes with them, by the names that pipelines have for
    them."""
    found: dict[str, Any] = {}
    for seed, which in enumerate(("", "negative_")):
        found[f"{which}prompt_embeds"] = embedding(seed, TEXT, channels)
        found |= {f"{which}{what}": embedding(10 + seed, width) for what, width in pooled.items()}
        if mask is not None:
            found[f"{which}{name}"] = mask()
    return found


@dataclass(frozen=True)
class Pipe:
    """One pipeline.

    Args:
        name: of its class in diffusers.
        parts: makes what it consists of; what is left out is None.
        call: what its call takes.
        contexts: names of the calls of the model in one step.
        larger: what another size takes.
        callback: whether it has `callback_on_step_end`.
        runs: of one module in one call of the model, by kind, where they are more than one.
        settings: attributes of the pipeline that its parts do not give.
        denoiser: name of the model that is called at its steps.
    """

    name: str
    parts: Callable[[], dict[str, Any]]
    call: dict[str, Any]
    contexts: tuple[str, ...]
    larger: dict[str, Any]
    callback: bool = True
    runs: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    denoiser: str = "transformer"

    def build(self) -> Any:
        kind = getattr(diffusers, self.name)
        needed = [p.name for p in inspect.signature(kind.__init__).parameters.values() if p.default is p.empty]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe = kind(**dict.fromkeys(needed[1:]) | self.parts())
        pipe.set_progress_bar_config(disable=True)
        vars(pipe).update(self.settings)
        return pipe

    def sample(self, pipe: Any, steps: int = 6, seed: int = 0, **kwargs: Any) -> Tensor:
        """Its latents."""
        call = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False} | self.call | kwargs
        with torch.no_grad():
            out = pipe(generator=torch.Generator().manual_seed(seed), **call)[0]
        return out if isinstance(out, Tensor) else torch.cat(list(out), 2)


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def ones() -> Tensor:
    """The mask of a prompt's embedding."""
    return torch.ones(1, TEXT, dtype=torch.bool)


SKYREELS = prompts(6) | {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 4.0}
FLUX = {k: v for k, v in prompts(6, pooled_prompt_embeds=8).items() if "negative" not in k} | {
    "height": 32,
    "width": 48,
}
SD3 = prompts(6, pooled_prompt_embeds=8) | {"height": 64, "width": 48, "guidance_scale": 4.0}
HUNYUAN = {k: v for k, v in prompts(6, ones, pooled_prompt_embeds=8).items() if "negative" not in k}
PIXART = prompts(6, ones) | {"negative_prompt": None, "height": 64, "width": 64, "use_resolution_binning": False}

WAN = Pipe(
    "WanPipeline",
    lambda: {
        "transformer": transformer("WanTransformer3DModel"),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    },
    prompts(6) | {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 4.0},
    ("cond", "uncond"),
    {"height": 48},
)

PIPES = [
    WAN,
    Pipe(
        "CogView4Pipeline",
        lambda: {"transformer": transformer("CogView4Transformer2DModel"), "scheduler": _flow()},
        prompts(6) | {"height": 64, "width": 48, "guidance_scale": 4.0},
        ("cond", "uncond"),
        {"width": 64},
        runs={"mlp": 2},
    ),
    Pipe(
        "QwenImagePipeline",
        lambda: {
            "transformer": transformer("QwenImageTransformer2DModel"),
            "scheduler": _flow(use_dynamic_shifting=True),
        },
        prompts(6, ones, "prompt_embeds_mask") | {"height": 48, "width": 64, "true_cfg_scale": 4.0},
        ("cond", "uncond"),
        {"width": 80},
    ),
    Pipe(
        "SkyReelsV2Pipeline",
        lambda: {
            "transformer": transformer("SkyReelsV2Transformer3DModel"),
            "scheduler": diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
            ),
        },
        SKYREELS,
        ("cond", "uncond"),
        {"height": 48},
    ),
    Pipe(
        "HunyuanVideo15Pipeline",
        lambda: {
            "transformer": transformer("HunyuanVideo15Transformer3DModel"),
            "scheduler": _flow(),
            "guider": diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
            "vae": diffusers.AutoencoderKLHunyuanVideo15(
                latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1
            ),
        },
        {**prompts(6, lambda: torch.ones(1, TEXT), "prompt_embeds_mask"), "height": 64, "width": 96, "num_frames": 5}
        | {f"{which}prompt_embeds_2": embedding(seed, 2, 4) for seed, which in ((5, ""), (6, "negative_"))}
        | {f"{which}prompt_embeds_mask_2": torch.ones(1, 2) for which in ("", "negative_")},
        ("pred_cond", "pred_uncond"),
        {"height": 96},
        callback=False,
        settings={"vision_num_semantic_tokens": 3},
    ),
    Pipe(
        "Lumina2Pipeline",
        lambda: {"transformer": transformer("Lumina2Transformer2DModel"), "scheduler": _flow()},
        prompts(6, ones) | {"height": 64, "width": 48, "guidance_scale": 4.0},
        ("#0", "#1"),
        {"width": 64},
    ),
    Pipe(
        "CogVideoXPipeline",
        lambda: {
            "transformer": transformer("CogVideoXTransformer3DModel"),
            "scheduler": diffusers.CogVideoXDPMScheduler(),
        },
        prompts(6) | {"height": 64, "width": 48, "num_frames": 5, "guidance_scale": 4.0},
        ("cond_uncond",),
        {"num_frames": 9},
    ),
    Pipe(
        "LattePipeline",
        lambda: {"transformer": tiny_latte(), "scheduler": diffusers.DDIMScheduler()},
        prompts(TEXT_CHANNELS)
        | {"negative_prompt": None, "height": 128, "width": 128, "video_length": 4, "guidance_scale": 4.0},
        ("#0",),
        {"height": 192, "width": 192},
    ),
    Pipe(
        "LTXPipeline",
        lambda: {
            "transformer": transformer("LTXVideoTransformer3DModel"),
            "scheduler": _flow(use_dynamic_shifting=True),
        },
        prompts(6, ones) | {"height": 64, "width": 96, "num_frames": 9, "guidance_scale": 4.0},
        ("cond_uncond",),
        {"width": 128},
    ),
    Pipe(
        "StableDiffusion3Pipeline",
        lambda: {"transformer": transformer("SD3Transformer2DModel"), "scheduler": _flow(shift=3.0)},
        SD3,
        ("#0",),
        {"height": 48},
    ),
    Pipe(
        "PixArtSigmaPipeline",
        lambda: {
            "transformer": transformer("PixArtTransformer2DModel"),
            "scheduler": diffusers.DPMSolverMultistepScheduler(),
        },
        PIXART,
        ("#0",),
        {"width": 32},
        callback=False,
    ),
    Pipe(
        "FluxPipeline",
        lambda: {
            "transformer": transformer("FluxTransformer2DModel", guidance_embeds=True),
            "scheduler": _flow(use_dynamic_shifting=True),
        },
        FLUX,
        ("cond",),
        {"width": 64},
    ),
    Pipe(
        "HunyuanVideoPipeline",
        lambda: {
            "transformer": transformer("HunyuanVideoTransformer3DModel", guidance_embeds=True),
            "scheduler": _flow(shift=7.0),
        },
        HUNYUAN | {"height": 32, "width": 48, "num_frames": 5},
        ("cond",),
        {"height": 48},
    ),
]
"""Called once a branch of guidance (by name, and by order alone), batched, guidance-distilled; images and videos."""

HUNYUAN_IMAGE = Pipe(
    "HunyuanImagePipeline",
    lambda: {"transformer": transformer("HunyuanImageTransformer2DModel"), "scheduler": _flow()},
    prompts(6, ones, "prompt_embeds_mask")
    | {f"{which}prompt_embeds_2": embedding(seed, 2, 4) for seed, which in ((5, ""), (6, "negative_"))}
    | {f"{which}prompt_embeds_mask_2": torch.ones(1, 2) for which in ("", "negative_")}
    | {"height": 128, "width": 96},
    ("pred_cond", "pred_uncond"),
    {"width": 128},
)
"""Guided by what it is given as `guider` and `ocr_guider`."""


def named(name: str) -> Pipe:
    """The pipeline of `PIPES` of that class."""
    return next(tiny for tiny in PIPES if tiny.name == name)
