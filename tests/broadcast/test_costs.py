"""FLOPs of a generation, counted when they are asked for, on a copy of the model on the meta device."""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.broadcast import costs, generation
from pab_kernels.broadcast.costs import Arguments, call_costs, on_meta
from pab_kernels.nn import BroadcastModule, PABAttention, PABCrossAttention

pytestmark = pytest.mark.flops

HALF = PABConfig(spatial=Broadcast(2, (0, 1)), mlp=Broadcast(4, (0, 1)))
STEPS = 4
C = 64


class Layer(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attn = PABAttention(C, heads=2, kind="spatial", **how)
        self.mlp = BroadcastModule(nn.Linear(C, C), "mlp")
        self.out = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return self.out(x + self.mlp(x))


class Model(nn.Module):
    """A layer, and what a copy must not trip over: tied weights, a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.back = nn.Linear(2 * C, C, bias=False)
        self.again = nn.Linear(2 * C, C, bias=False)
        self.again.weight = self.back.weight
        self.shift = torch.ones(C)

    def forward(self, x: Tensor, how: dict[str, Any] | None = None) -> Tensor:
        y = self.layer(x)
        return self.back(y) + self.again(y) + self.shift


def attention(rows: int, tokens: int) -> int:
    return ops.linear_flops(rows * tokens, C, 4 * C) + ops.attention_flops(rows, 2, tokens, tokens, C // 2)


def rest(rows: int, tokens: int) -> int:
    return 3 * ops.linear_flops(rows * tokens, C, 2 * C)


@torch.no_grad()
def run(model: nn.Module, x: Tensor, **kwargs: Any) -> int:
    """A generation; the FLOPs that ran."""
    with pab.generation(model, num_steps=STEPS), ops.flop_counter() as counter:
        for _ in range(STEPS):
            model(x, **kwargs)
    return counter.get_total_flops()


@pytest.fixture
def model() -> nn.Module:
    model = Model().eval()
    pab.enable(model, HALF)
    return model


def test_flops_are_those_that_ran_and_those_that_would_have(model: nn.Module) -> None:
    ran = run(model, torch.ones(2, 5, C))
    summary = pab.summary(model)
    spatial, mlp = (summary.contexts["#0"][kind] for kind in ("spatial", "mlp"))
    one = ops.linear_flops(2 * 5, C, C)
    assert summary.flops == ran == 2 * attention(2, 5) + one + STEPS * rest(2, 5)
    assert (spatial.flops, spatial.flops_without) == (2 * attention(2, 5), 4 * attention(2, 5))
    assert (mlp.flops, mlp.flops_without) == (one, 4 * one)
    assert summary.flops_without == 4 * (attention(2, 5) + one + rest(2, 5))
    assert f"FLOPs {summary.flops:.3e} of {summary.flops_without:.3e} ({summary.share:.1%})" in str(summary)


def test_each_set_of_shapes_and_each_branch_counts_for_itself(model: nn.Module) -> None:
    ran = 0
    with torch.no_grad(), pab.generation(model, num_steps=STEPS), ops.flop_counter() as counter:
        for _ in range(STEPS):
            for name, x in (("cond", torch.ones(1, 7, C)), ("uncond", torch.ones(3, 2, C))):
                with pab.context(model, name):
                    model(x)
    ran = counter.get_total_flops()
    summary = pab.summary(model)
    assert summary.flops == ran
    for name, shape in (("cond", (1, 7)), ("uncond", (3, 2))):
        assert summary.contexts[name]["spatial"].flops == 2 * attention(*shape)


class OffMeta(TorchDispatchMode):
    """Notes operations that make tensors elsewhere than on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta:
            self.seen.append(str(func))
        return out


def test_nothing_is_computed_and_no_weight_is_copied(model: nn.Module) -> None:
    run(model, torch.ones(1, 5, C))
    with OffMeta() as mode:
        assert pab.summary(model).flops > 0
    assert mode.seen == []
    with mode:
        torch.ones(1)
    assert mode.seen  # it does see them


class Around(nn.Module):
    """A part of the pipeline around a model: weights that are not the model's, and a method that the model knows."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(C, C)

    def see(self, *_: Any) -> None:
        pass

    def __deepcopy__(self, memo: Any) -> Any:
        pytest.fail("it was copied")


@pytest.mark.parametrize(
    "know",
    [
        lambda model, around: model.layer.register_forward_hook(around.see),
        lambda model, around: model.layer.register_forward_pre_hook(around.see),
        lambda model, around: setattr(
            model, "_cache_config", around.see
        ),  # as enable_cache(config) leaves its callback
        lambda model, around: setattr(model, "known", [around.own]),
    ],
    ids=["hook", "pre-hook", "cache config", "attribute"],
)
def test_what_a_model_knows_of_its_surroundings_is_not_copied(
    model: nn.Module, know: Callable[[nn.Module, Any], Any]
) -> None:
    know(model, Around())
    ran = run(model, torch.ones(1, 5, C))
    with OffMeta() as mode:
        assert pab.summary(model).flops == ran
    assert set(mode.seen) <= {"aten.detach.default"}  # the same memory


def test_a_thread_that_goes_on_calling_disturbs_no_count(model: nn.Module) -> None:
    def counted(*args: Any) -> Any:
        with pab.context(model, "cond"):
            model(torch.ones(1, 6, C))
        return call_costs(*args)

    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        with pab.context(model, "cond"):
            model(torch.ones(1, 5, C))
        with mock.patch.object(generation, "call_costs", counted):
            summary = pab.summary(model)
    assert summary.flops_without == attention(1, 5) + ops.linear_flops(5, C, C) + rest(1, 5)


def test_the_copy_has_no_tensor_of_the_model_and_keeps_what_is_tied(model: nn.Module) -> None:
    copied = on_meta(model)
    assert all(t.is_meta for t in (*copied.parameters(), *copied.buffers(), copied.shift))
    assert copied.again.weight is copied.back.weight
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers(), model.shift))


def test_a_generation_is_counted_once_for_each_set_of_shapes(model: nn.Module) -> None:
    run(model, torch.ones(1, 5, C))
    with mock.patch("pab_kernels.broadcast.generation.call_costs", side_effect=AssertionError):
        pytest.raises(AssertionError, pab.summary, model)
    first = pab.summary(model)
    with mock.patch("pab_kernels.broadcast.generation.call_costs", side_effect=AssertionError):
        assert pab.summary(model) == first


def test_a_model_changed_since_is_counted_as_it_is_in_its_next_generation(model: nn.Module) -> None:
    run(model, torch.ones(1, 5, C))
    before = pab.summary(model).flops
    model.layer.out = nn.Sequential(model.layer.out, nn.Linear(2 * C, 2 * C))  # as a LoRA would
    ran = run(model, torch.ones(1, 5, C))
    assert pab.summary(model).flops == ran == before + STEPS * ops.linear_flops(5, 2 * C, 2 * C)


def _hook(model: nn.Module) -> None:
    def see(module: nn.Module, args: Any, out: Tensor) -> None:
        assert not out.is_meta, "the hook saw the copy"

    model.layer.register_forward_hook(see)


def _accelerate(model: nn.Module) -> None:
    for module in (model.layer.out, model.back):
        pytest.importorskip("accelerate").cpu_offload(module, execution_device=torch.device("cpu"))


def _group(model: nn.Module) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")


def _method(model: nn.Module) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.out(self.mlp(x + self.attn(x)))

    model.layer.forward = types.MethodType(forward, model.layer)


@pytest.mark.parametrize("change", [_hook, _accelerate, _group, _method])
def test_whatever_is_around_a_forward_the_count_is_right(model: nn.Module, change: Callable[[nn.Module], None]) -> None:
    change(model)
    before = {name: t.device for name, t in model.state_dict().items()}
    ran = run(model, torch.ones(2, 5, C))
    assert pab.summary(model).flops == ran > 0
    assert {name: t.device for name, t in model.state_dict().items()} == before
    assert run(model, torch.ones(2, 5, C)) == ran


class Reads(Model):
    def forward(self, x: Tensor, how: dict[str, Any] | None = None) -> Tensor:
        return super().forward(x[:, : int(x.abs().sum() > 0) + 1])


def test_flops_that_cannot_be_known_are_left_out_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = Reads().eval()
    pab.enable(model, HALF)
    run(model, torch.ones(1, 5, C))
    with caplog.at_level(logging.INFO, "pab_kernels"):
        summary = pab.summary(model)
    assert summary.flops == summary.flops_without == 0 and summary.share == 1 and "FLOPs" not in str(summary)
    assert summary.contexts["#0"]["spatial"].reused == 2
    assert "Reads: FLOPs are not known, as it does not run on the meta device: " in caplog.text


def test_an_argument_of_which_nothing_is_known_leaves_flops_unknown(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    run(model, torch.ones(1, 5, C), how={"own": object()})
    with caplog.at_level(logging.INFO, "pab_kernels"):
        assert pab.summary(model).flops == 0
    assert "some arguments are neither tensors nor plain values" in caplog.text
    ran = run(model, torch.ones(1, 5, C), how={"scale": 0.5, "names": ["a", None], "dtype": torch.float32})
    assert pab.summary(model).flops == ran


def test_floats_do_not_part_arguments_and_everything_else_does() -> None:
    x = torch.ones(2, 3)

    def of(*args: Any, **kwargs: Any) -> Any:
        return Arguments.of(*pytree.tree_flatten((args, kwargs)))

    assert of(x, t=0.5) == of(x + 1, t=0.7) and hash(of(x, t=0.5)) == hash(of(x + 1, t=0.7))
    others = [
        of(x[:1], t=0.5),
        of(x.double(), t=0.5),
        of(x, t=1),
        of(x, s=0.5),
        of((x,), t=0.5),
        of(x, 0.5),
        of(x, t=None),
        of(x, t=True),
    ]
    assert len({of(x, t=0.5), *others}) == 1 + len(others)
    args, kwargs = of(x, t=[x.bool(), 3]).on_meta()
    assert args[0].is_meta and args[0].shape == x.shape and kwargs["t"][0].dtype == torch.bool and kwargs["t"][1] == 3


def test_a_call_that_failed_is_not_counted(model: nn.Module) -> None:
    x = torch.ones(1, 5, C)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        model(x)
        counted = pab.summary(model).flops
        with (
            mock.patch.object(model.layer.out, "forward", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            model(x)
    assert pab.summary(model).flops == counted > 0


def test_two_threads_that_count_leave_no_dispatch_mode_set(model: nn.Module) -> None:
    """Torch keeps in a global variable whether one is active: of two that overlap, the one that ends last would leave
    it set."""
    x = torch.ones(1, 5, C)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        model(x)
    inside: list[bool] = []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        inside.append(costs.COUNTING.locked())
        return x

    with mock.patch.object(type(model.layer.out), "forward", forward):
        pab.summary(model)
    assert inside == [True] and not costs.COUNTING.locked()
    assert not torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals()


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross = PABCrossAttention(C, heads=2, text_channels=8)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.cross(x, text)


def test_keys_and_values_of_the_text_count_once() -> None:
    model = Reader().eval()
    pab.enable(model, PABConfig(cross=Broadcast(2, (0, 1))))
    ran = run(model, torch.ones(1, 5, C), text=torch.ones(1, 3, 8))
    summary, text = pab.summary(model), ops.linear_flops(3, 8, 2 * C)
    own = ops.linear_flops(5, C, 2 * C) + ops.attention_flops(1, 2, 5, 3, C // 2)
    assert summary.flops == summary.contexts["#0"]["cross"].flops == ran == 2 * own + text
    assert summary.flops_without == 4 * (own + text)


class Twice(nn.Module):
    """One module that runs twice in a call, on other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = BroadcastModule(nn.Linear(C, C), "mlp")

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.mlp(x[:, :1])


def test_each_run_of_a_shared_module_has_its_own_flops() -> None:
    model = Twice()
    pab.enable(model, PABConfig(mlp=Broadcast(2, (0, 1))))
    ran = run(model, torch.ones(1, 5, C))
    summary = pab.summary(model)
    assert summary.flops == ran == 2 * (ops.linear_flops(5, C, C) + ops.linear_flops(1, C, C))
    assert summary.flops_without == 2 * ran


def test_a_copy_of_an_enabled_model_is_a_plain_one_as_before(model: nn.Module) -> None:
    x = torch.ones(1, 5, C)
    run(model, x)
    pab.summary(model)
    copied = copy.deepcopy(model)
    pab.disable(model)
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))
