"""LoRA adapters with weights that matter."""

from __future__ import annotations

from typing import Any

import peft
import torch

TARGETS = ["to_q", "to_v", "to_out.0", "proj", "net.0.proj", "net.2"]


def inject(model: Any, name: str = "first", seed: int = 0) -> None:
    """Put one into the linear layers of the blocks; `name` is that of the adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, name)
    model.requires_grad_(False)
