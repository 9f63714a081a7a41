"""Calls of STDiT3 with classifier-free guidance: both branches at once, or one after the other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CFG = ("batched", "apart")
"""The branches in one call of the transformer, or in two."""


@dataclass(frozen=True)
class Conditions:
    """What the transformer is told at every step of a generation, always the same tensors.

    Args:
        text: of the prompts `[B, 1, L, C]`.
        null: of the other branch, the same shape.
        both: text, then null `[2 B, 1, L, C]`.
        mask: `[B, L]`, nonzero for text, of both branches.
        fps: frames a second `[1]`.
        height, width: of the clip in pixels.
    """

    text: Tensor
    null: Tensor
    both: Tensor
    mask: Tensor
    fps: Tensor
    height: float
    width: float


def conditions(
    transformer: Any, embeds: Tensor, mask: Tensor | None, device: torch.device, fps: float, height: float, width: float
) -> Conditions:
    """The conditions of a generation; the null text is the checkpoint's `y_embedder.y_embedding`.

    Args:
        transformer: an STDiT3.
        embeds: of the prompts `[B, L, C]` or `[B, 1, L, C]`.
        mask: `[B, L]`; None: all is text.
        device: of the transformer when it runs.
        fps, height, width: see `Conditions`.

    Raises:
        ValueError: the embeddings or the mask have another shape.
    """
    null = transformer.y_embedder.y_embedding.to(device)
    text = embeds if embeds.ndim == 4 else embeds[:, None]
    if text.ndim != 4 or text.shape[1] != 1 or text.shape[3] != null.shape[1] or text.shape[2] > len(null):
        expected = f"[B, L, {null.shape[1]}] with L up to {len(null)}"
        raise ValueError(f"prompt_embeds have shape {list(embeds.shape)}; {expected} is supported")
    batch, tokens = text.shape[0], text.shape[2]
    mask = torch.ones(batch, tokens, dtype=torch.int64) if mask is None else mask
    if mask.shape != (batch, tokens):
        raise ValueError(f"prompt_attention_mask has shape {list(mask.shape)}; [{batch}, {tokens}] is supported")
    text, null = text.to(null), null[:tokens].expand(batch, 1, -1, -1)
    speed = torch.tensor([fps], device=device)
    return Conditions(text, null, torch.cat([text, null]), mask.to(device), speed, height, width)


def velocity(
    transformer: Any, latents: Tensor, t: Tensor, given: Conditions, guidance: float, cfg: str, free: Tensor | None
) -> Tensor:
    """The guided velocity `v_null + g (v_text - v_null)`, data minus noise.

    Args:
        transformer: an STDiT3.
        latents: `[B, C, T, h, w]`.
        t: the timestep, a scalar on the device.
        given: the conditions.
        guidance: g; at 1 only the text's branch is called.
        cfg: one of `CFG`. The calls are in the contexts "cond" and "uncond", unless one call serves both branches.
        free: bool `[B, T]`, false for given frames; None if no frame is given.

    Returns:
        `[B, C, T, h, w]`, float32.
    """

    def call(text: Tensor, context: str | None = None) -> Tensor:
        copies = len(text) // len(latents)
        # A tensor that is the same at several steps and then another one would show PAB a new prompt.
        mask = None if free is None else free.repeat(copies, 1)
        with transformer.cache_context(context) if context else contextlib.nullcontext():
            out = transformer(
                latents.repeat(copies, 1, 1, 1, 1),
                t.expand(len(text)),
                text,
                given.mask,
                x_mask=mask,
                fps=given.fps,
                height=given.height,
                width=given.width,
            )
        return out[:, : latents.shape[1]]  # without the variance

    if guidance == 1:
        return call(given.text, "cond")
    if cfg == "batched":
        text, null = call(given.both).chunk(2)
    else:
        text, null = call(given.text, "cond"), call(given.null, "uncond")
    return null + guidance * (text - null)
