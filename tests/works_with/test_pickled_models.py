"""An enabled model that was pickled or saved whole loads where the package is not installed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_models import FAMILIES
from tests.broadcast.toy import Pipe, noise, toy

LOADING = """
import importlib.abc, pickle, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pab_kernels":
            raise ModuleNotFoundError("pab_kernels is not installed here")
sys.meta_path.insert(0, Hidden())
import torch
for path in sys.argv[1:]:
    loaded = torch.load(path, weights_only=False) if path.endswith(".torch") else pickle.load(open(path, "rb"))
    modules = loaded.modules() if isinstance(loaded, torch.nn.Module) else [loaded]
    names = {name for m in modules for name in vars(m)}
    assert not [name for name in names if name.startswith("_pab") or name in ("forward", "step")], path
    print(path, type(loaded).__name__)
assert "pab_kernels" not in sys.modules
"""


def wan() -> Any:
    model = next(t for t in FAMILIES if t.name == "WanTransformer3DModel").build()
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))), num_steps=4)
    return model


def scheduler() -> Any:
    pipe = Pipe(toy(), FlowMatchEulerDiscreteScheduler())
    pab.enable(pipe, PABConfig(spatial=2))
    next(pipe.steps(4, 0))
    return pipe.scheduler


def test_they_load_without_the_package(tmp_path: Path) -> None:
    """A model and a scheduler, by `torch.save` and by pickle, in one interpreter: importing torch takes longer than all
    of it."""
    loaded = []
    for make in (wan, scheduler):
        made = make()
        torch.save(made, tmp_path / f"{make.__name__}.torch")
        (tmp_path / f"{make.__name__}.pickle").write_bytes(pickle.dumps(made))
        loaded += [f"{make.__name__}.{way} {type(made).__name__}" for way in ("torch", "pickle")]
    paths = [line.split()[0] for line in loaded]
    assert not any(b"pab_kernels" in (tmp_path / path).read_bytes() for path in paths)
    done = subprocess.run([sys.executable, "-c", LOADING, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == loaded


def test_a_model_that_was_called_loads_and_runs_plainly(tmp_path: Path) -> None:
    model = toy()
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))), num_steps=4)
    given = noise(0), torch.tensor([5.0]), noise(1, 3)
    with torch.no_grad():
        model(*given)
        torch.save(model, tmp_path / "whole")
        loaded = torch.load(tmp_path / "whole", weights_only=False)
        assert torch.equal(loaded(*given), toy()(*given))
        model(*given)  # the enabled one goes on
    assert pab.summary(model).contexts["#0"]["spatial"].reused == 2
