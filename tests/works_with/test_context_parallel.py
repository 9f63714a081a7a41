"""Context parallelism of diffusers: two ranks, each with half of the tokens and slots of its own, that do the same at
every step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import pab_kernels as pab
from tests.works_with.combination import FLUX, STEPS, TWO, WAN, check, run

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

RANKS = 2


def _even(seed: int) -> dict[str, Any]:
    """Numbers of tokens that two ranks can share."""
    inputs = FLUX.inputs(seed)
    more = {"hidden_states": 1, "img_ids": 0, "encoder_hidden_states": 1, "txt_ids": 0}
    return inputs | {name: torch.cat([inputs[name], inputs[name].narrow(dim, 0, 1)], dim) for name, dim in more.items()}


EVEN_FLUX = replace(FLUX, inputs=_even)


def split(model: Any) -> None:
    with mock.patch.object(torch.accelerator, "device_count", return_value=RANKS):  # which diffusers asks for a device
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))


def rank_runs(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    try:
        with torch.no_grad():
            check(WAN, split)
            for subject in (WAN, EVEN_FLUX):
                whole, model = subject.build(), subject.build()
                split(model)
                for m in (whole, model):
                    pab.enable(m, TWO, num_steps=STEPS)
                for a, b in zip(run(subject, model), run(subject, whole), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
                peaks = [pab.summary(m).peak_cache_bytes for m in (whole, model)]
                assert peaks[0] == RANKS * peaks[1] > 0
        Path(folder, f"rank {rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 of any fork
@pytest.mark.filterwarnings("ignore:`torch.distributed.* is deprecated:FutureWarning")  # diffusers' own use
def test_two_ranks(tmp_path: Path) -> None:
    """Forked, as importing diffusers takes each rank longer than its test; nothing here runs on several threads."""
    torch.multiprocessing.start_processes(rank_runs, (str(tmp_path),), nprocs=RANKS, start_method="fork")
    assert all((tmp_path / f"rank {rank}").exists() for rank in range(RANKS))
