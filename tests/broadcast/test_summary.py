"""What PAB says of a run: the summary, by context and kind, and the log, quiet unless it is asked for."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.nn import BroadcastModule
from tests.adapters.tiny_latte import LAYERS, TOKENS, noise, prompt, sample, tiny_latte, tiny_pipe

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = [pytest.mark.flops, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

HALF = PABConfig(*(Broadcast(2, (0, 1)),) * 4)
INPUTS = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}


@torch.no_grad()
def test_the_summary_says_what_was_done() -> None:
    model = tiny_latte()
    pab.enable(model, HALF)
    empty = pab.summary(model)
    assert empty.plan is None and empty.contexts == {} and empty.share == 1 and empty.forced == 0
    assert str(empty) == "the model was not called yet\ncache 0.0 MiB now, 0.0 MiB at the peak"
    with pab.generation(model, num_steps=4):
        assert "the model was not called yet" in str(pab.summary(model))
        for step in range(3):
            for name in ("cond", "uncond") if step else ("cond",):
                with pab.context(model, name):
                    model(**INPUTS)
        summary = pab.summary(model)
        assert summary.cache_bytes > 0
    lines = str(summary).splitlines()
    assert lines[0].startswith("4 steps, 2 patterns")
    at = next(i for i, line in enumerate(lines) if line.startswith("context uncond"))
    headings = ["context uncond", "computed", "stored", "reused", "forced", "MiB now", "MiB at the peak", "FLOPs saved"]
    assert re.split(" {2,}", lines[at]) == headings
    assert lines[at + 1].split() == ["spatial", "4", "2", "0", "2", "0.0", "0.0", "0"]
    at = next(i for i, line in enumerate(lines) if line.startswith("context cond"))
    saved = summary.contexts["cond"]["cross"].flops_saved
    assert lines[at + 3].split() == ["cross", "4", "4", "2", "0", "0.0", "0.0", f"{saved:.2e}"] and saved > 0
    assert len({len(line) for line in lines[at : at + 5]}) == 1
    assert summary.forced == (2 + 1 + 2) * LAYERS  # uncond at step 1: attention of both, cross, MLPs of both
    assert f"FLOPs {summary.flops:.3e} of {summary.flops_without:.3e} ({summary.share:.1%})" in lines
    assert pab.summary(model).cache_bytes == 0
    assert summary.cache_bytes > 0  # a summary is a snapshot


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [HALF, PABConfig(cross=Broadcast(3, (0, 1)), block=Broadcast(2, (0, 1), layers=(0,)))]
)
def test_bytes_and_flops_are_told_by_context_and_kind(config: PABConfig) -> None:
    model = tiny_latte()
    pab.enable(model, config)
    with pab.generation(model, num_steps=5):
        for _ in range(2):
            for name in ("cond", "uncond"):
                with pab.context(model, name):
                    model(**INPUTS)
        early = pab.summary(model)
        for _ in range(3):
            for name in ("cond", "uncond"):
                with pab.context(model, name):
                    model(**INPUTS)
    summary = pab.summary(model)
    tallies = [t for kinds in summary.contexts.values() for t in kinds.values()]
    assert sum(t.flops_saved for t in tallies) == summary.flops_without - summary.flops > 0
    assert sum(t.cache_bytes for kinds in early.contexts.values() for t in kinds.values()) == early.cache_bytes
    assert {t.cache_bytes for t in tallies} == {0} and sum(
        t.peak_cache_bytes for t in tallies
    ) >= summary.peak_cache_bytes
    cond, slot = (
        summary.contexts["cond"],
        INPUTS["hidden_states"].shape[2] * TOKENS * 64 * 4,
    )  # [frames, tokens, C] float32
    spatial = cond["spatial"]
    assert cond["cross"].peak_cache_bytes == slot * LAYERS and early.contexts["cond"]["cross"].cache_bytes in (
        0,
        slot * LAYERS,
    )
    if config is HALF:  # reused in 2 of 5 steps
        assert (
            spatial.flops_saved * 5 == spatial.flops_without * 2 and cond["temporal"].peak_cache_bytes == slot * LAYERS
        )
    else:  # as a part of the block of layer 0
        assert (
            spatial.reused == 0
            and spatial.flops_saved * 10 == spatial.flops_without * 2
            and cond["block"].flops_saved == 0
        )
        assert cond["block"].peak_cache_bytes == 2 * slot and spatial.peak_cache_bytes == 0


@torch.no_grad()
def test_a_call_of_another_mode_is_not_taken_for_the_branch_in_its_place() -> None:
    """A pass before the first step that fills the model's own cache: calls without names go by their order."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(nn.Linear(2, 2), "spatial")

        def forward(self, x: torch.Tensor, mode: str = "denoise") -> torch.Tensor:
            return self.attn(x)

    model = Modes()
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))))
    x = torch.ones(1, 2)
    with pab.generation(model, num_steps=2):
        model(3 * x, mode="fill")
        out = model(x)  # the step after, at which the first call of the one before would be reused
        assert torch.equal(out, model.attn.module(x))
    assert pab.summary(model).forced == 1


def test_recorded_gradients_run_plainly_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_latte().requires_grad_(True)
    with torch.no_grad():
        plain = model(**INPUTS).sample
    pab.enable(model, HALF, num_steps=5)
    with caplog.at_level(logging.WARNING, "pab_kernels"):
        for _ in range(2):
            out = model(**INPUTS).sample
            assert torch.equal(out, plain)
        out.sum().backward()
        assert model.transformer_blocks[0].attn1.to_out[0].weight.grad.abs().sum() > 0
        x = noise().requires_grad_()
        model.requires_grad_(False)
        assert model(**{**INPUTS, "hidden_states": x}).sample.requires_grad
    said = [r.getMessage() for r in caplog.records if "gradients are recorded" in r.getMessage()]
    assert len(said) == 1 and "torch.no_grad()" in said[0]
    summary = pab.summary(model)
    assert summary.plain_calls == 3 and "3 calls ran plainly: gradients were recorded" in str(summary)
    assert summary.flops == 0 and all(not kinds for kinds in summary.contexts.values())
    assert torch.equal(model(**INPUTS).sample, plain)  # gradients may be on where nothing asks for them
    summary = pab.summary(model)
    assert summary.plain_calls == 3 and summary.forced == 0  # the first step of the run: what ran plainly took none


def test_rules_without_effect_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, PABConfig(mlp=Broadcast(3, unit="timestep", at=(3,))))
    with caplog.at_level(logging.WARNING, "pab_kernels"):
        for _ in range(2):
            sample(pipe, 3)
    assert [r.getMessage() for r in caplog.records if r.name == "pab_kernels"] == [
        "mlp: timesteps 3 do not occur in this schedule and have no effect"
    ]


def test_only_warnings_are_written_unless_logging_is_configured(tmp_path: Path) -> None:
    code = """
import logging, sys, torch
import pab_kernels as pab
from pab_kernels.nn import BroadcastModule
for listening in (False, True):
    if listening:
        print("listening", file=sys.stderr)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    model = torch.nn.Sequential(BroadcastModule(torch.nn.Linear(2, 2), "spatial"))
    pab.enable(model, pab.PABConfig(spatial=2, mlp=2), num_steps=2)
    model(torch.ones(1, 2))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(pab.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""
    warnings = [
        "mlp: this model has no such sublayers",
        "Sequential: gradients are recorded: the model runs plainly; call it under torch.no_grad() for PAB",
    ]
    assert done.stderr.splitlines() == [
        *warnings,
        "listening",
        "INFO pab_kernels: Sequential: a generation of 2 steps, 2 patterns; spatial reused 1 of 2",
        *(f"WARNING pab_kernels: {line}" for line in warnings),
    ]
