"""Published models with random weights at a small size, saved in the layout of `--weights`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import MT5Config, MT5EncoderModel

from pab_kernels.models.open_sora.vae import OpenSoraVAE
from pab_kernels.models.open_sora_plan.causal_vae import CausalVAE
from pab_kernels.models.open_sora_plan.transformers import build
from tests.models.open_sora_plan_oracle import CHANNELS, LATTE, PLAN_12
from tests.models.tiny_open_sora import TEXT, one_layer
from tests.tiny_pipelines import text_encoder, tokenizer

FOLDERS = {
    "open-sora-1.2": "transformer",
    "open-sora-plan-1.1": "65x512x512",
    "open-sora-plan-1.2": "93x480p",
}
"""The folder of the transformer, by model."""


def save(model: str, folder: Path) -> Path:
    """Write the parts of a model, and return `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        place = folder / FOLDERS[model]
        if model == "open-sora-1.2":
            one_layer().save_pretrained(place)
            OpenSoraVAE((8, 8, 8, 8), 1, (8, 8, 8, 8), 1, norm_num_groups=4).save_pretrained(folder / "vae")
            encoder = text_encoder(TEXT)
        else:
            first = model == "open-sora-plan-1.1"
            config = LATTE if first else PLAN_12
            transformer: Any = build(config)
            for name, p in transformer.named_parameters():
                torch.nn.init.normal_(p, std=0.3 if "table" in name else 0.15)
            transformer.save_pretrained(place)
            (place / "config.json").write_text(json.dumps(config))
            CausalVAE(hidden_size=8, norm_num_groups=4).save_pretrained(folder / "vae")
            encoder = text_encoder(CHANNELS) if first else text_encoder(CHANNELS, MT5EncoderModel, MT5Config)
        encoder.save_pretrained(folder / "text_encoder")
        tokenizer().save_pretrained(folder / "tokenizer")
    return folder
