"""The transformer classes of diffusers that the tests run: a few unlike ones always, all of them where the marker asks
for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.adapters import tiny_models_a_to_k, tiny_models_k_to_z
from tests.adapters.tiny_models import FAMILIES, Tiny

RUN = FAMILIES + tiny_models_a_to_k.MORE + tiny_models_k_to_z.MORE
"""All of them but Latte, which the tests of its own adapter run."""

UNLIKE = (
    "WanTransformer3DModel",  # video: self-attention, cross-attention and an MLP in each block; CacheMixin
    "FluxTransformer2DModel",  # images: joint attention, then single blocks whose MLP shares a projection with attention; CacheMixin
    "HunyuanDiT2DModel",  # images: long skips from the first half of the blocks to the second, as in a UNet; no CacheMixin
    "TransformerTemporalModel",  # the temporal attention of UNets for video
    "WanVACETransformer3DModel",  # a second list of blocks, which return two streams: rules for blocks are refused
    "LTX2VideoTransformer3DModel",  # video and audio: two streams that attend to each other
    "T5FilmDecoder",  # audio: the sublayers of a block are a list of their own
    "MochiTransformer3DModel",  # video: neither FLOPs nor CUDA graphs, as it asks for autocast and reads a tensor on the host
)
"""Classes of which every run of the tests runs the tiny model. The others have the marker `all_models`."""

COMPILED = ("WanTransformer3DModel", "FluxTransformer2DModel")
"""Classes whose blocks are compiled: tests/works_with/test_shared_graphs.py."""

UNKNOWN_FLOPS = (
    {"MochiTransformer3DModel", "Lumina2Transformer2DModel"}
    | tiny_models_a_to_k.UNKNOWN_FLOPS
    | tiny_models_k_to_z.UNKNOWN_FLOPS
)
"""What does not run on the meta device: their FLOPs are not known. (Mochi asks for autocast there, and torch counts no
flex attention.)"""


def family(name: str) -> Tiny:
    """The tiny model of the class `name`."""
    return next(tiny for tiny in RUN if tiny.name == name)


def parameters(tinies: Iterable[Tiny]) -> list[Any]:
    """Tiny models for `pytest.mark.parametrize`, those not in `UNLIKE` with the marker `all_models`."""
    return [
        pytest.param(tiny, id=tiny.name, marks=() if tiny.name in UNLIKE else pytest.mark.all_models) for tiny in tinies
    ]
