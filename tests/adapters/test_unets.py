"""Pipelines around a UNet are followed like those around a transformer; what attends over frames in it is temporal."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

import pab_kernels as pab
from tests.adapters.tiny_pipes import Pipe
from tests.adapters.tiny_unets import UNETS, unet
from tests.broadcast.sampled_pipelines import CONFIG, assert_runs_as_the_oracle

STEPS = 6

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


@pytest.mark.parametrize("tiny", UNETS, ids=lambda t: t.name)
def test_a_pipeline_with_a_unet_runs_as_the_oracle_does(tiny: Pipe) -> None:
    summary = assert_runs_as_the_oracle(tiny, STEPS)
    assert tuple(summary.contexts) == tiny.contexts
    assert summary.forced == 0


def kinds(model: nn.Module) -> dict[str, set[str]]:
    """The kinds of attention in each list of modules, by the list's name."""
    found: dict[str, set[str]] = {}
    for s in pab.sublayers(model):
        if s.kind not in ("mlp", "block"):
            (holder,) = re.findall(r"(\w+)(?:\.\d+)?\.(?:temporal_)?transformer_blocks", s.name) or [s.name]
            found.setdefault(f"{holder}.{'temporal' if '.temporal_' in s.name else 'attn' + s.name[-1]}", set()).add(
                s.kind
            )
    return found


SPATIAL = {"attentions.attn1": {"spatial"}, "attentions.attn2": {"cross"}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("UNet2DConditionModel", SPATIAL),
        ("UNetMotionModel", SPATIAL | {"motion_modules.attn1": {"temporal"}, "motion_modules.attn2": {"temporal"}}),
        (
            "UNet3DConditionModel",
            SPATIAL
            | {f"{holder}.attn{i}": {"temporal"} for holder in ("temp_attentions", "transformer_in") for i in (1, 2)},
        ),
        ("UNetSpatioTemporalConditionModel", SPATIAL | {"attentions.temporal": {"temporal", "cross"}}),
    ],
)
def test_attention_over_frames_is_temporal_and_all_other_is_not(name: str, expected: dict[str, set[str]]) -> None:
    assert kinds(unet(name)) == expected


def test_a_motion_module_by_its_class_alone_is_temporal() -> None:
    """As its own model, or as another model's part under any name."""
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    module = AnimateDiffTransformer3D(
        2, 4, in_channels=8, norm_num_groups=2, cross_attention_dim=None, double_self_attention=True
    )
    for model in (module, nn.ModuleDict({"extra": module})):
        assert {s.kind for s in pab.sublayers(model) if ".attn" in s.name} == {"temporal"}


def test_image_conditioned_video_is_found() -> None:
    assert {s.kind for s in pab.sublayers(unet("I2VGenXLUNet"))} == {"spatial", "temporal", "cross", "mlp", "block"}


def test_a_pipeline_with_neither_says_what_to_pass() -> None:
    class Prior:
        prior: Any = nn.Linear(1, 1)
        scheduler = None

    with pytest.raises(
        TypeError, match="a pipeline with a `transformer` or a `unet`, and a `scheduler`: pass the denoiser itself"
    ):
        pab.enable(Prior(), CONFIG)
