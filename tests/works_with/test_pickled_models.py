"""An enabled model that was pickled or saved whole loads where the package is not installed."""

from __future__ import annotations

import contextlib
import importlib.abc
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_models import FAMILIES
from tests.broadcast.toy import Pipe, noise, toy


class Hidden(importlib.abc.MetaPathFinder):
    """The package is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "pab_kernels":
            raise ModuleNotFoundError("pab_kernels is not installed here")


@contextlib.contextmanager
def without_the_package() -> Iterator[None]:
    """Inside, nothing of it has been imported or can be."""
    ours = [name for name in sys.modules if name.partition(".")[0] == "pab_kernels"]
    modules, finder = {name: sys.modules.pop(name) for name in ours}, Hidden()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(modules)


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
    """A model and a scheduler, by `torch.save` and by pickle."""
    for make in (wan, scheduler):
        made = make()
        torch.save(made, tmp_path / "saved")
        pickled = pickle.dumps(made)
        assert b"pab_kernels" not in (tmp_path / "saved").read_bytes() + pickled
        with without_the_package():
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module("pab_kernels")
            for loaded in (torch.load(tmp_path / "saved", weights_only=False), pickle.loads(pickled)):
                assert type(loaded) is type(made)
                parts = loaded.modules() if isinstance(loaded, torch.nn.Module) else [loaded]
                names = {name for part in parts for name in vars(part)}
                assert not [name for name in names if name.startswith("_pab") or name in ("forward", "step")]
            assert not [name for name in sys.modules if name.partition(".")[0] == "pab_kernels"]


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
