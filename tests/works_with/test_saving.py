"""Copies and checkpoints of an enabled model are plain, and nothing keeps it alive after `disable`."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import diffusers
import pytest
import torch

import pab_kernels as pab
from tests.adapters.tiny_latte import sample, tiny_pipe
from tests.adapters.tiny_pipes import named
from tests.works_with.combination import FLUX, LATTE, STEPS, TWO, WAN, Subject, run, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # its schedulers
]
subjects = pytest.mark.parametrize("subject", [WAN, FLUX, LATTE], ids=lambda s: s.name)


@subjects
def test_a_deep_copy(subject: Subject) -> None:
    model = subject.build()
    plain = run(subject, model)
    pab.enable(model, TWO, num_steps=STEPS)
    subject.call(model, 0)
    twin = copy.deepcopy(model)
    assert same(run(subject, twin), plain)
    with pytest.raises(RuntimeError, match="not enabled"):
        pab.summary(twin)
    with pab.generation(model, num_steps=STEPS):
        reused = run(subject, model)
    pab.enable(twin, TWO, num_steps=STEPS)
    assert same(run(subject, twin), reused) and not same(reused, plain)


@subjects
def test_save_pretrained_saves_the_plain_model(subject: Subject, tmp_path: Path) -> None:
    model = subject.build()
    state, plain = {k: v.clone() for k, v in model.state_dict().items()}, run(subject, model)
    model.save_pretrained(tmp_path / "plain")
    pab.enable(model, TWO, num_steps=STEPS)
    subject.call(model, 0)
    model.save_pretrained(tmp_path / "enabled")
    files = {folder: {f.name: f.read_bytes() for f in (tmp_path / folder).iterdir()} for folder in ("plain", "enabled")}
    assert files["plain"] == files["enabled"]
    loaded = type(model).from_pretrained(tmp_path / "enabled")
    for m in (model, loaded):
        assert m.state_dict().keys() == state.keys() and all(
            torch.equal(v, state[k]) for k, v in m.state_dict().items()
        )
    for a, b in zip(run(subject, loaded), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # weights in a file lie otherwise than in memory


def test_a_pipeline_saved_while_enabled(tmp_path: Path) -> None:
    pipe = tiny_pipe(diffusers.DDIMScheduler())
    plain = sample(pipe, 3)
    pab.enable(pipe, TWO)
    reused = sample(pipe, 3)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.LattePipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None, vae=None)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(loaded, 3), plain)
    pab.enable(loaded, TWO)
    torch.testing.assert_close(sample(loaded, 3), reused)
    assert not torch.allclose(plain, reused)


@pytest.mark.parametrize(
    ("subject", "compiled"), [(LATTE, False), (WAN, False), (WAN, True)], ids=["Latte", "Wan", "Wan compiled"]
)
def test_nothing_keeps_a_pipeline_alive_after_disable(subject: Subject, compiled: bool) -> None:
    """Not even until the collector comes; what `compile` leaves in a model refers to it, and is for the collector."""
    pipe = named("LattePipeline" if subject is LATTE else "WanPipeline").build()
    if compiled:
        pipe.transformer.compile(backend="eager")
    pab.enable(pipe, TWO)
    pipe.scheduler.set_timesteps(4)
    pipe.transformer(**subject.inputs(0))
    torch._dynamo.reset()
    summary = pab.summary(pipe)
    refs = [weakref.ref(o) for o in (pipe, pipe.transformer, pipe.scheduler, *pipe.transformer.modules())]
    refs += [weakref.ref(p) for p in pipe.transformer.parameters()]
    gc.collect()  # what others left
    gc.disable()
    try:
        pab.disable(pipe)
        del pipe
        if compiled:
            gc.collect()
        assert not [ref() for ref in refs if ref() is not None]
    finally:
        gc.enable()
    assert summary.plan is not None
