"""What of a call's arguments may stay the same from step to step."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pab_kernels.broadcast.inputs import Inputs


def test_all_but_latents_and_timestep_may_stay_the_same_in_lists_and_objects_too() -> None:
    latents, timestep, text, keys = torch.zeros(2, 3), torch.tensor([5.0]), torch.zeros(4), torch.zeros(5)
    held = SimpleNamespace(layers=[{"keys": keys}], name="reference", length=5)
    inputs = Inputs(
        (latents, timestep, held), {"text": [text], "scale": 2.0, "mode": "read", "mask": None}, latents, timestep
    )
    found = inputs.steady
    assert len(found) == 3 and all(a is b for a, b in zip(found, (keys, text, 2.0), strict=True))
