"""The transformer classes of diffusers that the tests run: a few unlike ones always, all of them where the marker asks
for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.adapters.tiny_image_models import IMAGES
from tests.adapters.tiny_models import FAMILIES, Tiny
from tests.adapters.tiny_other_models import OTHERS
from tests.adapters.tiny_video_models import VIDEOS

RUN = FAMILIES + IMAGES + VIDEOS + OTHERS
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

UNKNOWN_FLOPS = {
    "Lumina2Transformer2DModel",
    "MochiTransformer3DModel",  # autocast
    "AnyFlowFARTransformer3DModel",  # flex attention
    "Cosmos3OmniTransformer",  # autocast
    "ErnieImageTransformer2DModel",  # autocast
    "GlmImageTransformer2DModel",  # indexing by a mask
    "HeliosTransformer3DModel",  # autocast
    "HiDreamImageTransformer2DModel",  # tokens of each expert are counted
    "HunyuanVideo15Transformer3DModel",  # whether there is an image is read from it
    "HunyuanVideoFramepackTransformer3DModel",  # the text is cut to its mask
    "Ideogram4Transformer2DModel",  # autocast
    "Kandinsky6SRTransformer3DModel",  # flex attention
    "NucleusMoEImageTransformer2DModel",  # tokens of each expert are counted
    "OmniGenTransformer2DModel",  # the highest position is read
    "QwenImage21Transformer2DModel",  # a mask tells how often tokens are repeated
    "SanaWMTransformer3DModel",  # autocast
    "WanAnimate2Transformer3DModel",  # a cache of keys is an argument; flex attention
}
"""What does not run on the meta device, and what of it: their FLOPs are not known. (Torch counts no flex attention.)"""


def family(name: str) -> Tiny:
    """The tiny model of the class `name`."""
    return next(tiny for tiny in RUN if tiny.name == name)


def parameters(tinies: Iterable[Tiny]) -> list[Any]:
    """Tiny models for `pytest.mark.parametrize`, those not in `UNLIKE` with the marker `all_models`."""
    return [
        pytest.param(tiny, id=tiny.name, marks=() if tiny.name in UNLIKE else pytest.mark.all_models) for tiny in tinies
    ]
