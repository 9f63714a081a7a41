"""Fitted weights against their equation, and sampling with them against a replay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.nn import BroadcastModule, PABAttention
from pab_kernels.rules.plan import Plan, Sublayer
from pab_kernels.rules.schedule import Schedule
from tests.adapters.tiny_latte import sample, tiny_latte, tiny_pipe
from tests.adapters.tiny_pipes import named, transformer
from tests.analysis.calibration.small_pipe import PROMPTS, STEPS, call, loop, pipe_of
from tests.broadcast.forecast_oracle import Denoiser

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.usefixtures("no_flops"),
]
LINE = Broadcast(2, (0.2, 0.9), reuse="linear")
RULES = PABConfig(spatial=LINE)


def denoiser() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser().double().eval().requires_grad_(False)


def fitted(pipe: Any, rules: PABConfig = RULES, prompts: Any = PROMPTS[:2], **given: Any) -> PABConfig:
    return pab.fit(pipe, prompts, rules, **{"num_steps": STEPS, "call": call} | given)


def recorded(module: nn.Module, run: Callable[[], Any], branches: int) -> list[list[Tensor]]:
    """The outputs of a module in every branch of guidance, by step."""
    made: list[Tensor] = []
    hook = module.register_forward_hook(
        lambda _, args, out: made.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    run()
    hook.remove()
    return [made[branch::branches] for branch in range(branches)]


def by_the_equation(runs: list[list[Tensor]], i: int, s: int, p: int) -> float:
    a = sum(float(((c[i] - c[s]) * (c[s] - c[p])).sum()) for c in runs)
    return a / sum(float((c[s] - c[p]).square().sum()) for c in runs)


def reads(rules: PABConfig, sublayer: Sublayer, steps: int = STEPS) -> dict[int, tuple[int, ...]]:
    plan = Plan(rules, Schedule(steps), (sublayer,))
    found = {i: plan.decision(sublayer.name, i).reads for i in plan.steps}
    return {i: read for i, read in found.items() if len(read) == 2}


def test_weights_are_those_of_least_squares_over_branches_and_clips() -> None:
    model = denoiser()
    config = fitted(model, call=loop)
    assert broadcaster_of(model) is None and config.fitted is not None and config.fitted.timesteps is None
    assert replace(config, fitted=None) == RULES and config.fitted.names == {"attn"}
    pab.enable(model, PABConfig(), num_steps=STEPS)  # `loop` names its branches
    runs = []
    for seed, prompt in enumerate(PROMPTS[:2]):
        with pab.generation(model, num_steps=STEPS):
            runs += recorded(model.attn, lambda p=prompt, s=seed: loop(model, p, s), 2)
    planned = reads(RULES, Sublayer("attn", "spatial", 0))
    assert len(planned) == 5
    for i, (s, p) in planned.items():
        w = config.fitted.weight("attn", i, (s, p))
        assert w == pytest.approx(by_the_equation(runs, i, s, p), abs=6e-5), "four digits"
        assert w != pytest.approx((i - s) / (s - p), abs=1e-2)


def test_sampling_with_them_is_the_replay_by_the_equation() -> None:
    config = fitted(denoiser(), call=loop)
    assert config.fitted is not None
    model = denoiser()
    pab.enable(model, config, num_steps=STEPS)
    with torch.no_grad():
        got = loop(model, PROMPTS[3], 9)
    assert pab.summary(model).forced == 0

    plain, planned = denoiser(), reads(RULES, Sublayer("attn", "spatial", 0))
    outputs: list[dict[int, Tensor]] = [{}, {}]
    calls, attend = 0, plain.attn.forward

    def attention(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        (step, branch), calls = divmod(calls, 2), calls + 1
        if step not in planned:
            outputs[branch][step] = attend(*args, **kwargs)[0]
            return outputs[branch][step], None
        (s, p), of_branch = planned[step], outputs[branch]
        w = torch.tensor(config.fitted.weight("attn", step, (s, p)))  # type: ignore[union-attr]
        return of_branch[s] + w.double() * (of_branch[s] - of_branch[p]), None

    pab.enable(plain, PABConfig(), num_steps=STEPS)
    plain.attn.forward = attention  # type: ignore[method-assign]
    with torch.no_grad():
        expected = loop(plain, PROMPTS[3], 9)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim v", "unipc", "flow euler", "heun"])
def test_an_unseen_clip_is_closer_to_the_full_run(name: str) -> None:
    pipe = pipe_of(name)
    full = call(pipe, PROMPTS[4], 7)
    config = fitted(pipe)
    assert config.fitted is not None and config.fitted.timesteps == tuple(map(float, pipe.scheduler.timesteps))
    error = {}
    for title, rules in {"line": RULES, "fitted": config}.items():
        pab.enable(pipe, rules)
        error[title] = float((call(pipe, PROMPTS[4], 7) - full).norm())
        assert pab.summary(pipe).plan.notes == ()  # type: ignore[union-attr]
        pab.disable(pipe)
    assert 0 < error["fitted"] < 0.9 * error["line"]


def test_the_output_of_the_whole_model_has_weights_too() -> None:
    rules = PABConfig(model=LINE)
    model = denoiser()
    config = fitted(model, rules, call=loop)
    assert config.fitted is not None and config.fitted.names == {""}
    results = {}
    for title, of in {"full": PABConfig(), "line": rules, "fitted": config}.items():
        pab.enable(model, of, num_steps=STEPS)
        with torch.no_grad():
            results[title] = loop(model, PROMPTS[2], 5)
        pab.disable(model)
    line, ours = (float((results[title] - results["full"]).norm()) for title in ("line", "fitted"))
    assert 0 < ours < 0.7 * line


def latte_run(pipe: Any, prompt: Any, seed: int) -> Tensor:
    return sample(pipe, 9, seed=seed)


def test_blocks_are_fitted_by_the_change_that_they_make() -> None:
    rules = PABConfig(block=LINE, mlp=LINE)
    pipe = tiny_pipe(model=tiny_latte(num_layers=1))
    config = fitted(pipe, rules, [None], num_steps=9, call=latte_run)
    assert config.fitted is not None
    blocks = {"transformer_blocks.0", "temporal_transformer_blocks.0"}
    assert config.fitted.names == blocks, "MLPs do not run where their blocks are reused"
    changes: list[Tensor] = []
    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_hook(lambda _, args, out: changes.append(out - args[0]))
    latte_run(pipe, None, 0)
    hook.remove()
    for i, (s, p) in reads(rules, Sublayer("b", "block", 0), 9).items():
        w = config.fitted.weight("transformer_blocks.0", i, (s, p))
        assert w == pytest.approx(by_the_equation([changes], i, s, p), abs=1e-3)
    pab.enable(pipe, config)
    latte_run(pipe, None, 1)
    assert pab.summary(pipe).plan.notes == ()  # type: ignore[union-attr]


def test_compiled_blocks_run_eagerly_while_they_are_fitted() -> None:
    plain, compiled = (tiny_pipe(model=tiny_latte(num_layers=1)) for _ in range(2))
    for block in (*compiled.transformer.transformer_blocks, *compiled.transformer.temporal_transformer_blocks):
        block.compile(fullgraph=True, backend="eager")
    rules = PABConfig(spatial=LINE, temporal=LINE, mlp=LINE)
    assert fitted(plain, rules, [None], num_steps=9, call=latte_run) == fitted(
        compiled, rules, [None], num_steps=9, call=latte_run
    )


def test_two_transformers_that_run_in_turn_have_weights_for_their_own_steps() -> None:
    tiny = named("WanPipeline")
    second = transformer("WanTransformer3DModel")
    for p in second.parameters():
        p.data = p.data.flip(0)
    tiny = replace(tiny, parts=lambda parts=tiny.parts: parts() | {"transformer_2": second, "boundary_ratio": 0.8})
    pipe = tiny.build()
    config = fitted(pipe, PABConfig(mlp=LINE), [None], num_steps=12, call=lambda p, *_: tiny.sample(p, 12))
    assert config.fitted is not None and pipe.scheduler.timesteps[5] > 800 > pipe.scheduler.timesteps[6]
    (row,) = config.fitted.rows
    assert row.reads == ((3, 2, 1), (5, 4, 2), (9, 8, 6)), "those of the second begin with its own first step"
    pab.enable(pipe, config)
    tiny.sample(pipe, 12)
    plans = [s.plan for s in pab.summary(pipe).models.values()]
    assert len(plans) == 2 and all(plan is not None and plan.notes == () for plan in plans)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_attention_that_is_kept_before_its_projection_takes_the_weights_of_its_output(cache_dtype: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PABAttention(64, 2, "spatial"), BroadcastModule(nn.Tanh(), "mlp")).requires_grad_(False)
    rules = PABConfig(spatial=LINE, mlp=LINE, cache_point="unprojected", cache_dtype=cache_dtype)

    def curve(model: nn.Module, prompt: float, seed: int = 0) -> list[Tensor]:
        return [model(torch.sin(torch.arange(64.0) + prompt * i).expand(1, 3, 64)) for i in range(12)]

    config = pab.fit(model, [0.3, 0.31], rules, num_steps=12, call=curve)
    assert config.fitted is not None and config.fitted.names == {"0", "1"}
    results = []
    for of in (config, replace(config, cache_point="pre_gate", cache_dtype=None)):
        pab.enable(model, of, num_steps=12)
        results.append(torch.stack(curve(model, 0.32)))
        assert pab.summary(model).forced == 0
        pab.disable(model)
    assert (results[0] - results[1]).abs().max() < (1e-5 if cache_dtype is None else 0.05)


# What does not fit


def test_another_number_of_steps_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipe_of("unipc")
    pab.enable(pipe, fitted(pipe))
    with caplog.at_level(logging.WARNING, "pab_kernels"):
        for _ in range(2):
            call(pipe, PROMPTS[0], 0, STEPS + 4)
    (record,) = caplog.records
    assert "fitted weights are for 14 steps and this schedule has 18: reuses take the line" in record.getMessage()


def test_a_model_without_such_sublayers_is_refused_at_once() -> None:
    config = fitted(denoiser(), call=loop)
    model = tiny_latte(num_layers=1)
    with pytest.raises(ValueError, match=r"name 'attn', which is no sublayer of this LatteTransformer3DModel"):
        pab.enable(model, config, num_steps=STEPS)
    assert broadcaster_of(model) is None


def test_all_runs_of_a_module_that_runs_twice_in_a_call_are_fitted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x).tanh() + 3 * self.mlp(x**2).tanh()

    def call(model: nn.Module, prompt: Any, seed: int) -> None:
        x = torch.linspace(-1, 1, 6).double().view(2, 3)
        for _ in range(10):
            x = x - 0.1 * model(x)

    model = Twice().requires_grad_(False)
    config = pab.fit(model, [None], PABConfig(mlp=LINE), num_steps=10, call=call, kinds={"mlp": "mlp"})
    runs = recorded(model.mlp, lambda: call(model, None, 0), 2)
    assert config.fitted is not None
    for i, (s, p) in reads(PABConfig(mlp=LINE), Sublayer("mlp", "mlp", 0), 10).items():
        assert config.fitted.weight("mlp", i, (s, p)) == pytest.approx(by_the_equation(runs, i, s, p), abs=1e-4)


def test_outputs_that_never_change_take_the_line() -> None:
    model = nn.Sequential(BroadcastModule(nn.Tanh(), "mlp"))

    def still(model: nn.Module, prompt: None, seed: int) -> None:
        for _ in range(10):
            model(torch.ones(2, 3))

    config = pab.fit(model, [None], PABConfig(mlp=LINE), num_steps=10, call=still)
    assert config.fitted is not None and config.fitted.weight("0", 5, (4, 2)) == 0.5


def test_the_model_is_restored_also_after_an_error() -> None:
    pipe = pipe_of()
    parts = (pipe.transformer, pipe.transformer.attn, pipe.scheduler)
    before = [dict(vars(part)) for part in parts]

    def failing(pipe: Any, prompt: Any, seed: int) -> None:
        call(pipe, 0.5, 0)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fitted(pipe, call=failing)
    seen: list[tuple[int, int | None]] = []
    fitted(pipe, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, STEPS) for i in range(STEPS)] * 2
    for part, vars_before in zip(parts, before, strict=True):
        assert vars(part).keys() == vars_before.keys()


def enabled() -> Any:
    return pab.enable(pipe_of(), RULES)


def broken() -> Any:
    pipe = pipe_of()
    for p in pipe.transformer.attn.parameters():
        p.data.fill_(torch.nan)
    return pipe


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (pipe_of, {"prompts": "a text"}, ValueError, "prompts is a list of at least one prompt, got 'a text'"),
        (pipe_of, {"prompts": []}, ValueError, "prompts is a list of at least one prompt"),
        (pipe_of, {"num_steps": 0}, ValueError, "num_steps must be a whole number"),
        (pipe_of, {"rules": PABConfig(spatial=2)}, ValueError, "no rule of the config reuses linearly"),
        (
            pipe_of,
            {"rules": PABConfig(spatial=LINE, cache_point="post_gate")},
            ValueError,
            "fitted before the gate, got cache_point 'post_gate'",
        ),
        (
            pipe_of,
            {"rules": PABConfig(spatial=Broadcast(2, (0, 2), "step", "linear"))},
            ValueError,
            "no reuse of the rules reads two outputs in 14 steps",
        ),
        (enabled, {}, ValueError, "PAB is enabled on this Denoiser; call pab.disable"),
        (object, {}, TypeError, "got object; supported are a pipeline"),
        (denoiser, {"call": None}, TypeError, "got a bare Denoiser without call"),
        (pipe_of, {"call": lambda *_: None}, ValueError, "the call did not run the Denoiser: there is nothing to fit"),
        (
            pipe_of,
            {"call": lambda pipe, prompt, seed: call(pipe, prompt, seed, STEPS + seed)},
            ValueError,
            "the fitted runs have different schedules",
        ),
        (
            pipe_of,
            {"num_steps": 30},
            ValueError,
            f"call made a schedule of {STEPS} steps where num_steps=30 was asked",
        ),
        (
            denoiser,
            {"num_steps": 30, "call": loop},
            ValueError,
            f"the call took {STEPS} of 30 steps, and weights are for whole runs",
        ),
        (broken, {}, ValueError, "an output of attn that is read at step .* is not finite"),
        (pipe_of, {"rules": "balanced"}, TypeError, "config must be a PABConfig, got str"),
        (pipe_of, {"seed": "3"}, TypeError, "seed is a whole number, got '3'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(make: Any, given: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fitted(make(), **given)
