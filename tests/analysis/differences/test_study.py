"""`analyze`: what is measured, in which context, what is held meanwhile, and what is refused."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pab_kernels as pab
from pab_kernels.analysis import Analysis, analyze
from pab_kernels.analysis.differences import probe
from pab_kernels.analysis.differences.probe import Probe
from pab_kernels.analysis.differences.study import Interrupted
from pab_kernels.broadcast.broadcaster import ATTRIBUTE, Broadcaster
from tests.adapters.tiny_latte import LAYERS, sample, tiny_latte, tiny_pipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 6


class Scripted(nn.Module):
    """Attention whose output is a number that is given to it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(3, 3)
        self.value = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return torch.full_like(x, self.value), None, torch.full((2, 1), 2 * self.value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Scripted()

    def forward(self, x: Tensor) -> Tensor:
        out, _, _ = self.attn(x)
        return x.add_(out.mul_(3))  # in place, both


class Toy(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


def play(model: Any, values: dict[str | None, list[float]], before: Callable[[int], None] = lambda step: None) -> None:
    """Call the model at every step once for each context, with outputs as given; layer l gives l + 1 times as much."""
    for step in range(len(next(iter(values.values())))):
        before(step)
        for name, row in values.items():
            for layer, block in enumerate(model.blocks):
                block.attn.value = (layer + 1) * row[step]
            if name is None:
                model(torch.ones(1, 4, 3))
            else:
                with pab.context(model, name):
                    model(torch.ones(1, 4, 3))


def test_differences_are_those_of_the_outputs_by_context() -> None:
    model = Toy()
    values = {"cond": [1.0, 3.0, 2.0], "uncond": [5.0, 5.0, 4.0]}
    found = analyze(model, lambda: play(model, values), num_steps=3)
    assert (found.model, found.num_steps, found.complete) == ("Toy", 3, True)
    by_key = {(d.context, d.name): d for d in found.differences}
    assert set(by_key) == {(c, n) for c in values for n in ("blocks.0.attn", "blocks.1.attn", "blocks.0", "blocks.1")}
    for (context, name), d in by_key.items():
        row, factor = values[context], d.layer + 1
        assert d.mse[0] is None and d.relative[0] is None
        for i in (1, 2):
            apart = abs(row[i] - row[i - 1])
            # 12 numbers and 2 of twice the size; a block adds three times the first of them
            wanted = (factor * apart) ** 2 * (12 + 4 * 2) / 14 if d.kind == "spatial" else (3 * factor * apart) ** 2
            assert d.mse[i] == pytest.approx(wanted, rel=1e-6), name
            assert d.relative[i] == pytest.approx(apart / row[i], rel=1e-6), name
    assert found.curve("spatial")[1] == pytest.approx((2 / 3 + 0) / 2)
    assert found.layers("block", "mse")[1][2] == pytest.approx((36 + 36) / 2)


def test_contexts_without_names_are_told_apart_by_their_order() -> None:
    model = Toy(1)

    def run() -> None:
        for step in range(3):
            for value in (1.0 + step, 7.0):
                model.blocks[0].attn.value = value
                with pab.context(model, "all", step):
                    model(torch.ones(1, 2, 3))

    found = {d.context: d.relative for d in analyze(model, run, num_steps=3).differences if d.kind == "spatial"}
    assert found == {"all": (None, pytest.approx(1 / 2), pytest.approx(1 / 3)), "all#1": (None, 0.0, 0.0)}


def test_over_a_step_without_a_branch_nothing_is_compared() -> None:
    """Guidance in an interval: what the branch gave two steps ago is no neighbour."""
    model = Toy(1)

    def run() -> None:
        for step in range(5):
            for name in ("cond", "uncond") if step != 2 else ("cond",):
                model.blocks[0].attn.value = 1.0 + step
                with pab.context(model, name, step):
                    model(torch.ones(1, 2, 3))

    found = {d.context: d.relative for d in analyze(model, run, num_steps=5).differences if d.kind == "spatial"}
    assert [value is None for value in found["cond"]] == [True, False, False, False, False]
    assert [value is None for value in found["uncond"]] == [True, False, True, True, False]


def test_a_run_is_the_same_as_without_and_nothing_stays_behind() -> None:
    pipe = tiny_pipe()
    plain = sample(pipe, STEPS)
    outs: list[Tensor] = []
    found = analyze(pipe, lambda: outs.append(sample(pipe, STEPS)))
    assert torch.equal(outs[0], plain) and torch.equal(sample(pipe, STEPS), plain)
    assert ATTRIBUTE not in vars(pipe.transformer)
    assert all("forward" not in vars(m) for m in pipe.transformer.modules()) and "step" not in vars(pipe.scheduler)
    assert found.kinds == ("spatial", "temporal", "cross", "mlp", "block")
    assert len(found.differences) == LAYERS * 7 and found.timesteps is not None and len(found.timesteps) == STEPS
    for d in found.differences:
        assert d.mse[0] is None and all(
            v is not None and math.isfinite(v) and v > 0 for v in d.mse[1:] + d.relative[1:]
        )
    assert {kind: len(found.layers(kind)) for kind in found.kinds} == dict.fromkeys(found.kinds, LAYERS)


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "local_scalar" not in str(function), "the device is waited for"
        return function(*args, **(kwargs or {}))


def test_no_more_than_one_steps_outputs_are_held_and_nothing_is_read_meanwhile() -> None:
    model, size, alive = Toy(4), 1 * 4 * 3, []

    def count(step: int) -> None:
        tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == size]
        alive.append(len(tensors))

    def run() -> None:
        with _NoReads():
            play(model, {None: [float(i * i) for i in range(5)]}, count)

    gc.collect()
    analyze(model, run, num_steps=5)
    held = [n - alive[0] for n in alive]
    assert held == [0, 8, 8, 8, 8], "four attentions and four blocks"


def test_interrupted_runs_keep_what_was_measured() -> None:
    model = Toy()

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    seen: list[tuple[int, int]] = []
    with pytest.raises(Interrupted) as info:
        analyze(
            model,
            lambda: play(model, {"cond": [1.0, 2.0, 4.0, 8.0]}, stop),
            num_steps=4,
            progress=lambda *p: seen.append(p),
        )
    found = info.value.analysis
    assert isinstance(info.value, KeyboardInterrupt) and not found.complete and found.start is None
    assert found.curve("spatial") == (None, pytest.approx(0.5), pytest.approx(0.5), None)
    assert seen == [(1, 4), (2, 4), (3, 4)]
    assert "interrupted" in str(found) and json.loads(json.dumps(found.to_dict()))["complete"] is False
    assert ATTRIBUTE not in vars(model) and not any("forward" in vars(m) for m in model.modules())


def _press(times: int = 1) -> None:
    """Send Ctrl-C as a terminal does; the handler runs before the next instruction of the main thread."""
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def pythons_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


VALUES = [1.0, 2.0, 4.0, 8.0]


def _stopped(model: Any, run: Callable[[], Any], **kwargs: Any) -> Analysis:
    with pytest.raises(Interrupted) as info:
        analyze(model, run, num_steps=4, **kwargs)
    assert ATTRIBUTE not in vars(model) and not any("forward" in vars(m) for m in model.modules())
    return info.value.analysis


@pytest.mark.usefixtures("pythons_handler")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an exception in a destructor
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("where", ["before a step", "in progress", "in a hook", "in a warning", "in a destructor"])
def test_ctrl_c_anywhere_keeps_what_was_measured(where: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    steps: list[int] = []

    def press(here: str) -> None:
        if here == where and len(steps) == 3:
            _press(times)

    class Dropped:
        def __del__(self) -> None:  # Python prints an exception here and continues
            press("in a destructor")

    def before(step: int) -> None:
        steps.append(step)
        press("before a step")
        warnings.warn("a library warns", stacklevel=1)
        Dropped()

    hook = model.blocks[1].register_forward_pre_hook(lambda *_: press("in a hook"))
    monkeypatch.setattr(warnings, "showwarning", lambda *_, **__: press("in a warning"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        found = _stopped(model, lambda: play(model, {"cond": VALUES}, before), progress=lambda *_: press("in progress"))
    hook.remove()
    assert not found.complete and found.start is None
    assert found.curve("spatial")[:2] == (None, pytest.approx(0.5)) and found.curve("spatial")[3] is None


@pytest.mark.usefixtures("pythons_handler")
def test_after_the_last_call_of_the_model_ctrl_c_loses_nothing() -> None:
    model = Toy()

    def run() -> None:
        play(model, {"cond": VALUES})
        _press()  # while the pipeline decodes: no sublayer checks, and the run finishes

    found = _stopped(model, run)
    assert found.complete and None not in found.curve("block")[1:]


@pytest.mark.usefixtures("pythons_handler")
@pytest.mark.parametrize(
    ("owner", "name"), [(Broadcaster, "__init__"), (Broadcaster, "detach"), (Probe, "__init__"), (Probe, "differences")]
)
def test_ctrl_c_in_the_bookkeeping_is_acted_on_after_it(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model = getattr(owner, name), Toy()

    def pressed(*args: Any, **kwargs: Any) -> Any:
        _press(2)
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, pressed)
    found = _stopped(model, lambda: play(model, {"cond": VALUES}))
    assert found.complete is (name in ("detach", "differences"))
    assert len(found.differences) == (4 if found.complete else 0)


@pytest.mark.parametrize("moment", range(0, 400, 7))
def test_an_exception_between_any_two_lines_of_the_probe_keeps_what_was_measured(moment: int) -> None:
    """A debugger, a timer or an alarm may raise anywhere, which `ctrl_c` does not control."""
    model, lines = Toy(1), []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != probe.__file__:
            return None
        lines.append(frame.f_lineno)
        if len(lines) == moment + 1:
            raise KeyboardInterrupt
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            play(model, {"cond": VALUES})
        finally:
            sys.settrace(None)

    before = sys.gettrace()
    try:
        found = _stopped(model, run)
    except pytest.fail.Exception:
        assert len(lines) <= moment, "the run was over before"
        return
    finally:
        sys.settrace(before)
    wanted = (None, pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5))
    for d in found.differences:
        measured = [value for value in d.relative if value is not None]
        assert d.kind == "block" or list(d.relative[: len(measured) + 1]) == list(wanted[: len(measured) + 1])


def test_an_error_that_ctrl_c_became_is_ctrl_c() -> None:
    model = Toy()

    def stop(step: int) -> None:
        if step == 2:
            try:
                raise KeyboardInterrupt
            except BaseException as error:
                raise RuntimeError("a callback failed") from error

    found = _stopped(model, lambda: play(model, {"cond": VALUES}, stop))
    assert found.curve("spatial") == (None, pytest.approx(0.5), None, None)


@pytest.mark.usefixtures("pythons_handler")
def test_an_error_after_ctrl_c_is_shown_as_what_ended_the_run() -> None:
    model = Toy()

    def stop(step: int) -> None:
        if step == 2:
            _press()
            raise RuntimeError("a loader was interrupted")

    with pytest.raises(Interrupted) as info:
        analyze(model, lambda: play(model, {"cond": VALUES}, stop), num_steps=4)
    assert str(info.value.__cause__) == "a loader was interrupted" and info.value.analysis.curve("spatial")[
        1
    ] == pytest.approx(0.5)


def test_before_the_first_step_nothing_is_measured_and_the_report_is_empty(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def stop(step: int) -> None:
        raise KeyboardInterrupt

    model = Toy()
    found = _stopped(model, lambda: play(model, {"cond": VALUES}, stop))
    assert found.differences == () and "interrupted" in str(found)
    assert json.loads(found.save(tmp_path / "a.json").read_text())["sublayers"] == []
    found.plot(tmp_path / "a.png")
    found.plot_layers(tmp_path / "b.png")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_whose_outputs_are_not_finite_is_reported_as_such(bad: float, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = Toy()
    found = analyze(model, lambda: play(model, {"cond": [1.0, *[bad] * 9]}), num_steps=10)
    assert found.complete and found.start is None
    read = json.loads(found.save(tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert read["curves"]["spatial"]["mse"][1:] == [None] * 9
    found.plot(tmp_path / "a.png")
    found.plot_layers(tmp_path / "b.png")


def test_results_are_written_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipe = tiny_pipe()
    found = analyze(pipe, lambda: sample(pipe, STEPS))
    read = json.loads(found.save(tmp_path / "a.json").read_text())
    assert read["curves"]["cross"]["mse"] == list(found.curve("cross", "mse"))
    assert [s["name"] for s in read["sublayers"]] == [d.name for d in found.differences]
    curves = found.plot(tmp_path / "curves.png")
    for ax, what in zip(curves.axes, ("relative", "mse"), strict=True):
        lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
        assert {kind: list(lines[kind]) for kind in found.kinds} == {
            kind: list(found.curve(kind, what)[1:]) for kind in found.kinds
        }
    maps = found.plot_layers(tmp_path / "layers.png")
    grids = [ax.get_images()[0].get_array() for ax in maps.axes if ax.get_images()]
    assert [grid.shape for grid in grids] == [(LAYERS, STEPS)] * 5
    assert grids[2][1][3] == pytest.approx(found.layers("cross")[1][3])
    assert (tmp_path / "curves.png").stat().st_size > 0 and (tmp_path / "layers.png").stat().st_size > 0


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    pipe = tiny_pipe()
    enabled = tiny_latte()
    pab.enable(enabled)
    for thing, kwargs, error, message in (
        (enabled, {"num_steps": 3}, ValueError, "PAB is enabled on this LatteTransformer3DModel"),
        (Toy(), {}, ValueError, "num_steps is required for a bare module"),
        (pipe, {"num_steps": 3}, ValueError, "not allowed for a pipeline, whose scheduler has it"),
        (object(), {}, TypeError, "got object; supported are"),
        (nn.Linear(1, 1), {"num_steps": 3}, TypeError, "no attention was found"),
        (Toy(), {"num_steps": 3}, ValueError, r"run\(\) did not call the Toy"),
    ):
        with pytest.raises(error, match=message) as info:
            analyze(thing, lambda: None, **kwargs)
        assert "\n" not in str(info.value)


@pytest.fixture(scope="module")
def demo() -> Analysis:
    pytest.importorskip("safetensors")
    from pab_kernels.models.demo import load, parse

    pipe = load("ddim", device="cpu")
    inputs = pipe.inputs([parse("a red circle moves right at night")], [0])
    return analyze(
        pipe.pipe, lambda: pipe.pipe(**inputs, num_inference_steps=20, guidance_scale=3.0, output_type="latent")
    )


def test_the_demo_model_shows_the_u(demo: Analysis) -> None:
    """The relative difference of every kind is larger in the first and in the last 15 % than in the middle."""
    for kind in demo.kinds:
        first, middle, last = demo.parts(kind)
        assert first is not None and middle is not None and last is not None
        assert first > 1.2 * middle and last > 1.2 * middle, kind


def test_the_demo_model_shows_the_order_of_the_kinds(demo: Analysis) -> None:
    """By mean squared difference, at every step after the first: spatial > temporal > cross. Relative to the outputs it
    does not hold."""
    spatial, temporal, cross = (demo.curve(kind, "mse") for kind in ("spatial", "temporal", "cross"))
    middle = range(6, 17)
    for i in middle:
        a, b, c = spatial[i], temporal[i], cross[i]
        assert a is not None and b is not None and c is not None and a > b > c, i
    assert demo.start is not None and demo.start.follows_order
    assert {kind: rule.range for kind, rule in demo.start.config.broadcasts()} == {
        "spatial": 2,
        "temporal": 2,
        "cross": 6,
    }
