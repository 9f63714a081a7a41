"""What `find` takes for what in every transformer class of diffusers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import diffusers.models.transformers as transformers
import pytest
import torch
from torch import nn

from pab_kernels.adapters.finder import find
from pab_kernels.rules.plan import Sublayer
from tests.adapters.expected_models import EXPECTED

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "BriaFibo2Transformer2DModel": {"n_layers": 2, "injection_layer_ids": (1,)},
    "ConsisIDTransformer3DModel": {"num_layers": 2, "is_train_face": True},
    "EasyAnimateTransformer3DModel": {
        **_HEADS,
        "mmdit_layers": 1,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "text_embed_dim": 8,
        "time_embed_dim": 8,
    },
    "HiDreamImageTransformer2DModel": {
        **_HEADS,
        "num_single_layers": 2,
        "patch_size": 2,
        "in_channels": 4,
        "caption_channels": [8, 4],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
        "llama_layers": (0, 1),
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "in_channels": 4,
        "sample_size": 8,
        "patch_size": 2,
        "hidden_size": 16,
        "cross_attention_dim": 8,
    },
    "LatteTransformer3DModel": {
        **_HEADS,
        "in_channels": 4,
        "sample_size": 8,
        "patch_size": 2,
        "cross_attention_dim": 16,
        "caption_channels": 8,
    },
    "LuminaNextDiT2DModel": {
        "hidden_size": 24,
        "num_layers": 2,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "cross_attention_dim": 8,
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 2,
        "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
    },
    "Transformer2DModel": {**_HEADS, "in_channels": 32, "cross_attention_dim": 8},
    "DualTransformer2DModel": {**_HEADS, "in_channels": 32, "cross_attention_dim": 8},
    "DreamLiteTransformer2DModel": {**_HEADS, "in_channels": 32, "cross_attention_dim": 8},
    "TransformerTemporalModel": {**_HEADS, "in_channels": 32},
    "WanVACETransformer3DModel": {"num_layers": 4, "vace_layers": [0, 2]},
}
"""Where the class cannot be built with two layers and its defaults, or would lack some of its sublayers."""


def _exported() -> list[str]:
    return [n for n, c in vars(transformers).items() if inspect.isclass(c) and issubclass(c, nn.Module)]


def _meta(name: str) -> nn.Module:
    cls = getattr(transformers, name)
    config = CONFIGS.get(name)
    if config is None:
        parameters = inspect.signature(cls.__init__).parameters.values()
        counts = [
            p
            for p in parameters
            if type(p.default) is int and p.default > 2 and re.search("layers|depth|blocks", p.name)
        ]
        config = {p.name: 2 for p in counts}
    with torch.device("meta"):
        return cls(**config)


def _named(sublayers: Iterable[Sublayer]) -> set[str]:
    return {f"{s.kind}:{re.sub(r'[.][0-9]+(?=[.]|$)', '', s.name)}" for s in sublayers if s.kind != "block"}


def test_every_exported_class_is_listed() -> None:
    assert set(_exported()) <= set(EXPECTED)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta:UserWarning")
@pytest.mark.parametrize("name", sorted(set(_exported()) & set(EXPECTED)))
def test_the_sublayers_of_a_class_of_diffusers(name: str) -> None:
    sublayers = find(_meta(name))
    assert _named(sublayers) == set(EXPECTED[name].split())
    blocks = {s.name for s in sublayers if s.kind == "block"}
    for s in sublayers:
        assert s.why
        if s.kind != "block" and s.block is None:
            assert name == "WanAnimateTransformer3DModel", "only its face adapter stands beside the blocks"
        elif s.kind != "block":
            assert s.block in blocks and s.layer == int(s.block.rpartition(".")[2])
