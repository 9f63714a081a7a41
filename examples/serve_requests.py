"""Serve three sampling requests that arrive one after the other, on one model with PAB, and mix them step by step
without batching.

    python examples/serve_requests.py

Each request has latents, a scheduler and a PAB generation of its own. A server takes one step of whichever request is
due: nothing of one reaches another, and every result is the one that the request gives alone. It uses the demo model; a
minute on two CPU cores.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels.analysis.pipelines import load_pipeline

STEPS, GUIDANCE = 12, 3.0
PROMPTS = ("a red circle moves right at night", "a green bar moves up at dawn", "a blue column moves left in the day")

pipe = load_pipeline("demo")
model = pipe.transformer


@torch.no_grad()
def sample(prompt: str, seed: int) -> Iterator[Tensor]:
    """The latents after every step of one request."""
    cond, uncond = pipe.encode_prompt(prompt, negative_prompt="", device=model.device)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, model.config.in_channels, 8, 32, 32, generator=torch.Generator().manual_seed(seed))
    request = pab.generation(model, timesteps=scheduler.timesteps)  # released when this function is left
    for t in scheduler.timesteps:
        outs = []
        with request:  # taken up for one step, and put down again
            for name, embedding in (("cond", cond), ("uncond", uncond)):
                with pab.context(model, name):
                    outs.append(model(x, timestep=t.expand(1), encoder_hidden_states=embedding).sample[:, :3])
        x = scheduler.step(outs[1] + GUIDANCE * (outs[0] - outs[1]), t, x).prev_sample
        yield x
    print(f"{prompt!r}: {pab.summary(request).share:.0%} of the FLOPs")


def main() -> None:
    """Mix the requests, then run each alone and compare."""
    pab.enable(model, pab.PABConfig(spatial=2, temporal=3, cross=4))
    waiting = deque(enumerate(PROMPTS))
    running: deque[tuple[int, Iterator[Tensor]]] = deque()
    latest: dict[int, Tensor] = {}
    while waiting or running:
        if waiting:  # another one arrives
            seed, prompt = waiting.popleft()
            running.append((seed, sample(prompt, seed)))
        seed, steps = running.popleft()
        x = next(steps, None)
        if x is not None:
            latest[seed] = x
            running.append((seed, steps))
    for seed, prompt in enumerate(PROMPTS):
        *_, alone = sample(prompt, seed)
        print(f"{prompt!r}: mixed and alone are equal: {torch.equal(latest[seed], alone)}")
    pab.disable(model)


if __name__ == "__main__":
    main()
