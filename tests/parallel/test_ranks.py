"""What `parallelize` accepts: ranks, meshes and models; here on eight ranks that are simulated in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import pab_kernels as pab
from pab_kernels.models.stdit3 import STDiT3
from tests.adapters.tiny_stdit3 import conditions, noise, text, tiny_stdit3


@pytest.fixture
def eight_fake_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model() -> nn.Module:
    return tiny_stdit3()


def test_without_torch_distributed_it_says_how_to_start(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="start the program with torchrun"):
        pab.parallelize(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cfg": 3}, ValueError, "got cfg=3; supported are 1, and 2"),
        ({"sequence": 3}, ValueError, "got cfg=1 and sequence=3, 3 ranks, but 8 are running"),
        ({"cfg": 2, "sequence": 8}, ValueError, "16 ranks, but 8 are running"),
        ({"cfg": 2.0}, TypeError, "got cfg=2.0; a number of ranks"),
        ({"timeout": "5"}, ValueError, "got timeout='5'"),
        ({"timeout": 0}, ValueError, "got timeout=0; seconds above 0"),
        ({"input_dtype": torch.int16}, TypeError, "int16"),
    ],
)
def test_numbers_that_do_not_fit(
    model: nn.Module, eight_fake_ranks: None, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pab.parallelize(model, **options)
    assert not [name for name in vars(model) if "pab" in name]


def test_meshes(model: nn.Module, eight_fake_ranks: None) -> None:
    for shape, names, message in (
        ((2, 4), ("cfg", "rows"), "got a mesh with dimensions"),
        ((8,), None, "got a mesh with dimensions"),
        ((8,), ("cfg",), "got a mesh of 8 ranks along 'cfg'"),
    ):
        with pytest.raises(ValueError, match=message):
            pab.parallelize(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    pab.parallelize(model, init_device_mesh("cpu", (2, 4), mesh_dim_names=("cfg", "sequence")))
    with pytest.raises(RuntimeError, match="is parallel already; call pab.unparallelize first"):
        pab.parallelize(model)
    pab.unparallelize(model)
    pab.unparallelize(model)
    assert not [name for module in model.modules() for name in vars(module) if "pab" in name]


def test_what_is_no_model(eight_fake_ranks: None) -> None:
    with pytest.raises(TypeError, match="got object; supported are"):
        pab.parallelize(object())
    with pytest.raises(ValueError, match="got a Linear; "):
        pab.parallelize(nn.Linear(3, 3))


def test_patches_of_several_frames_are_refused(eight_fake_ranks: None) -> None:
    with pytest.raises(ValueError, match="patches hold 2 frames"):
        pab.parallelize(tiny_stdit3(patch_size=(2, 2, 2)))


@torch.no_grad()
def test_outputs_before_the_projection_are_not_kept_where_frames_are_split(
    model: nn.Module, eight_fake_ranks: None
) -> None:
    config = pab.PABConfig(temporal=2, cache_point="unprojected")
    pab.parallelize(pab.enable(model, config, num_steps=4))
    with pytest.raises(ValueError, match="got cache_point='unprojected' for a model whose frames are split"):
        model(noise(), torch.full((2,), 900.0), text(), **conditions())


@torch.no_grad()
def test_a_module_that_was_replaced_since_is_an_error(model: nn.Module, eight_fake_ranks: None) -> None:
    pab.parallelize(model)
    blocks = model.get_submodule("temporal_blocks")
    blocks[1] = tiny_stdit3(seed=1).temporal_blocks[1]
    with pytest.raises(RuntimeError, match="temporal_blocks.1.attn was replaced since pab.parallelize"):
        model(noise(), torch.full((2,), 900.0), text(), **conditions())
    pab.unparallelize(model)
    model(noise(), torch.full((2,), 900.0), text(), **conditions())


def test_gradients_and_fits_are_refused(model: nn.Module, eight_fake_ranks: None) -> None:
    pab.parallelize(model)
    with pytest.raises(RuntimeError, match="gradients are recorded"):
        model(noise().requires_grad_(), torch.full((2,), 900.0), text(), **conditions())
    with pytest.raises(ValueError, match="is parallel"):
        pab.fit(model, ["a"], pab.PABConfig(temporal=pab.Broadcast(2, reuse="linear")), num_steps=4, call=print)


@torch.no_grad()
def test_modules_are_split_only_in_calls_of_the_model(model: nn.Module, eight_fake_ranks: None) -> None:
    attention = model.get_submodule("temporal_blocks.0.attn")
    x = torch.randn(1, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    alone = attention(x)
    pab.parallelize(model)
    assert torch.equal(attention(x), alone)


class Around(STDiT3):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@torch.no_grad()
def test_a_subclass_that_passes_its_arguments_on(model: nn.Module, eight_fake_ranks: None) -> None:
    model.__class__ = Around
    pab.parallelize(model, cfg=2)
    assert model(noise(), torch.full((2,), 900.0), text(), **conditions()).shape == (2, 8, 3, 5, 7)
