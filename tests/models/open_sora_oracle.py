"""Open-Sora's sampling written out in float64: one sample and one branch of guidance at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pab_kernels.models.stdit3 import STDiT3


@torch.no_grad()
def sampled(
    model: STDiT3,
    noise: Tensor,
    prompt_embeds: Tensor,
    prompt_attention_mask: Tensor,
    *,
    steps: int,
    num_frames: int,
    height: int,
    width: int,
    guidance: float = 7.0,
    fps: float = 24.0,
    given: Tensor | None = None,
    mask: Sequence[float] | None = None,
    noises: Sequence[Tensor] = (),
) -> Tensor:
    """Latents `[B, 4, T, h, w]`.

    Args:
        model: in float64.
        noise: `[B, 4, T, h, w]`.
        prompt_embeds, prompt_attention_mask: `[B, L, C]`, `[B, L]`.
        steps, num_frames, height, width, guidance, fps: of the sampling.
        given: latents `[B, 4, T, h, w]`, of which frames with a mask below 1 are taken.
        mask: for every frame.
        noises: for the times at which given frames are noised, in order.
    """
    r = math.sqrt(height * width / 512**2) * math.sqrt(1 if num_frames == 1 else num_frames // 17 * 5)
    u = [1 - i / steps for i in range(steps)]
    times = [1000 * (r * x / (1 - x + r * x)) for x in u] + [0.0]
    null = model.y_embedder.y_embedding
    results = []
    told: dict[str, Any] = {"fps": torch.tensor([fps]), "height": height, "width": width}
    for b in range(len(noise)):
        z, extra = noise[b].double(), list(noises)
        upper = None
        if given is not None and mask is not None:
            for frame, number in enumerate(mask):
                if number < 1:
                    z[:, frame] = given[b, :, frame]
            upper = [number == 1 for number in mask]
        for i in range(steps):
            if mask is not None:
                now = [number * 1000 >= times[i] for number in mask]
                if now != upper:
                    drawn = extra.pop(0)[b].double()
                    for frame, (free, was) in enumerate(zip(now, upper or now, strict=True)):
                        if free and not was:
                            z[:, frame] = (1 - times[i] / 1000) * z[:, frame] + times[i] / 1000 * drawn[:, frame]
                upper = now
            x_mask = None if upper is None else torch.tensor([upper])
            outputs = []
            for text in (prompt_embeds[b], null[: prompt_embeds.shape[1]]):
                t = torch.tensor([times[i]], dtype=torch.float64)
                text = text[prompt_attention_mask[b] != 0][None, None].double()
                outputs.append(model(z[None], t, text, x_mask=x_mask, **told)[0, :4].double())
            v = outputs[1] + guidance * (outputs[0] - outputs[1])
            step = z + v * (times[i] - times[i + 1]) / 1000
            z = step if upper is None else torch.where(torch.tensor(upper)[:, None, None], step, z)
        results.append(z)
    return torch.stack(results)
