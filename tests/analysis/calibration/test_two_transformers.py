"""Calibrations of a pipeline whose second transformer takes over at a boundary, as Wan 2.2's does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

pytest.importorskip("yaml")

import pab_kernels as pab
from pab_kernels.analysis.calibration.recording import record
from pab_kernels.analysis.calibration.schedules import Schedules
from tests.adapters.tiny_pipes import named, transformer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.usefixtures("no_flops"),
]

STEPS, HANDOVER = 14, 7
TINY = named("WanPipeline")


def parts() -> dict[str, Any]:
    second = transformer("WanTransformer3DModel")
    for p in second.parameters():
        p.data = p.data.flip(0)
    return TINY.parts() | {"transformer_2": second, "boundary_ratio": 0.8}


def sampled(pipe: Any, scale: float, seed: int, num_steps: int = STEPS) -> Tensor:
    """A scale of guidance stands for a prompt."""
    return TINY.sample(pipe, num_steps, seed, guidance_scale=scale)


def test_a_plan_for_both_is_what_was_measured(tmp_path: Path) -> None:
    pipe = replace(TINY, parts=parts).build()
    given: dict[str, Any] = {"num_steps": STEPS, "flops": 0.7, "call": sampled, "values": (-9.0, 9.0)}
    found = pab.calibrate(pipe, [4.0, 5.0, 3.0, 4.5], folder=tmp_path, **given)
    searched = next(row for row in found.searched if row.title == "searched")
    assert searched.share == pytest.approx(9 / STEPS), "the search knows which steps are computed"
    again = pab.calibrate(pipe, [4.0, 5.0, 3.0, 4.5], folder=tmp_path, **given)
    assert again.config == found.config and again.verified == found.verified
    full = sampled(pipe, 4.5, 3, found.sampling_steps)
    pab.enable(pipe, found.config)
    left = float(((sampled(pipe, 4.5, 3, found.sampling_steps) - full) / 18).double().square().mean())
    assert len(pab.summary(pipe).models) == 2 and found.sampling_steps == STEPS
    assert -10 * np.log10(left) == pytest.approx(found.verified.psnr[0], abs=0.01)


def test_the_second_transformer_begins_with_a_computed_step() -> None:
    pipe = replace(TINY, parts=parts).build()
    recording = record(pipe, lambda: sampled(pipe, 4.0, 0), lambda: None)
    assert recording.influence.handover == HANDOVER
    schedules = Schedules([recording], np.ones(STEPS), "forecast", STEPS)
    assert all(HANDOVER in at for at in schedules.best.values())
    for number in range(8, STEPS):
        rule = schedules.uniform(number).config
        assert rule is not None and rule.model is not None and HANDOVER in (rule.model.at or ())
