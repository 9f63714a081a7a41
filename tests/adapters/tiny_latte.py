"""A tiny Latte whose gates and shifts matter, its stock pipeline, and ways to see what runs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel
from torch import Tensor, nn

from pab_kernels import ops
from pab_kernels.broadcast import stream

FRAMES, SIZE, TEXT, TEXT_CHANNELS = 4, 16, 5, 24
LAYERS = 2
TOKENS = (SIZE // 4) ** 2


def tiny_latte(dtype: torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> Any:
    """2 layers of 2 heads x 32, patches of 4 x 4; `config` overrides what follows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LatteTransformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 32,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": LAYERS,
                "cross_attention_dim": 64,
                "attention_bias": True,
                "sample_size": SIZE,
                "patch_size": 4,
                "activation_fn": "gelu-approximate",
                "norm_type": "ada_norm_single",
                "norm_elementwise_affine": False,
                "norm_eps": 1e-6,
                "caption_channels": TEXT_CHANNELS,
                "video_length": FRAMES,
            }
            | config
        )
        for name, p in model.named_parameters():
            if "scale_shift_table" in name:
                nn.init.normal_(p, std=0.5)
            elif "adaln_single" in name:
                nn.init.normal_(p, std=0.1)
            elif "attn" in name and name.endswith("weight"):
                nn.init.normal_(p, std=0.25)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def tiny_pipe(scheduler: Any = None, model: Any = None) -> LattePipeline:
    """The stock pipeline, without text encoder and VAE."""
    pipe = LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=model or tiny_latte(),
        scheduler=scheduler or DDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(seed: int = 1, dtype: torch.dtype = torch.float32, text: int = TEXT) -> Tensor:
    return torch.randn(1, text, TEXT_CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sample(
    pipe: Any, steps: int = 10, *, guidance: float = 4.0, size: int = SIZE, seed: int = 0, **kwargs: Any
) -> Tensor:
    """One run of the pipeline: latents `[1, 4, FRAMES, size, size]`."""
    dtype = pipe.transformer.dtype
    kwargs = {"prompt_embeds": prompt(1, dtype), "negative_prompt_embeds": prompt(2, dtype)} | kwargs
    return pipe(
        negative_prompt=None,
        num_inference_steps=steps,
        guidance_scale=guidance,
        video_length=FRAMES,
        height=8 * size,
        width=8 * size,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    ).frames


def noise(
    seed: int = 0, *, batch: int = 1, height: int = SIZE, width: int = SIZE, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(batch, 4, FRAMES, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(*, batch: int = 1, height: int = SIZE, width: int = SIZE, text: int = TEXT) -> dict[str, Any]:
    """Of one call of the model."""
    return {
        "hidden_states": noise(batch=batch, height=height, width=width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": prompt(text=text).expand(batch, -1, -1),
    }


def run_model(
    call: Callable[..., Tensor], timesteps: Any, x: Tensor, texts: dict[str, Tensor], first: int = 0
) -> Tensor:
    """A sampling loop of its own: `call(context, step, x, timestep=, encoder_hidden_states=)` once a step and
    context."""
    for step in range(first, len(timesteps)):
        t = torch.full((x.shape[0],), int(timesteps[step]), device=x.device)
        outs = [call(name, step, x, timestep=t, encoder_hidden_states=text)[:, :4] for name, text in texts.items()]
        x = x - 0.1 * sum(outs)
    return x


SUBLAYER_MODULES = {
    "norm1": "norm1",
    "attn1": "attn1",
    "attn1.to_q": "attn1.to_q",
    "attn1.to_k": "attn1.to_k",
    "attn1.to_v": "attn1.to_v",
    "attn1.to_out": "attn1.to_out.0",
    "attn2": "attn2",
    "attn2.to_q": "attn2.to_q",
    "attn2.to_k": "attn2.to_k",
    "attn2.to_v": "attn2.to_v",
    "attn2.to_out": "attn2.to_out.0",
    "norm2": "norm2",
    "ff": "ff",
    "ff.in": "ff.net.0.proj",
    "ff.out": "ff.net.2",
}


@contextlib.contextmanager
def counted_calls(model: Any) -> Iterator[Counter[tuple[str, str]]]:
    """How often each module of a sublayer ran, by group of blocks and part, by forward hooks."""
    counts: Counter[tuple[str, str]] = Counter()
    handles = []
    for group, blocks in (("spatial", model.transformer_blocks), ("temporal", model.temporal_transformer_blocks)):
        for block in blocks:
            for part, path in SUBLAYER_MODULES.items():
                if getattr(block, part.split(".")[0]) is None:
                    continue
                key = (group, part)
                handles.append(
                    block.get_submodule(path).register_forward_hook(lambda *_, key=key: counts.update([key]))
                )
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def counted_operations() -> Iterator[dict[str, mock.MagicMock]]:
    """The fused operations, wrapped: what they were called with, and how often; `short_attention` counts as
    `attention`.

    Those of the residual stream are called with one argument, the object of the call.
    """
    counted = {
        name: mock.MagicMock(wraps=partial(stream.run_checked, name))
        for name in ("broadcast_residual", "project_residual")
    }
    counted["attention"] = mock.MagicMock(side_effect=lambda function, *args, **options: function(*args, **options))
    either = {name: partial(counted["attention"], getattr(ops, name)) for name in ("attention", "short_attention")}
    of_stream = mock.patch.object(stream, "run_checked", lambda op, call: counted[op](call))
    with of_stream, mock.patch.multiple(ops, **either):
        yield counted
