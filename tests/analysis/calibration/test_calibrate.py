"""Calibrations from end to end on small pipelines and a bare model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.analysis.calibration.calibration import Interrupted, NoPlan, Row
from pab_kernels.analysis.calibration.generations import Generations
from pab_kernels.analysis.calibration.sampler import PipelineSampler
from pab_kernels.analysis.calibration.store import Store
from pab_kernels.analysis.pipeline_call import Wish
from pab_kernels.rules.formats import load_config
from tests.analysis.calibration.small_pipe import PROMPTS, STEPS, VALUES, call, loop, pipe_of
from tests.analysis.tiny_dit import tiny_dit
from tests.broadcast.forecast_oracle import SHAPE, Denoiser, Pipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.usefixtures("no_flops"),
]


NARROW = (-3.0, 3.0)
"""Black and white of the results of DDIM."""


def calibrated(pipe: Any, prompts: Any = PROMPTS, **target: Any) -> Any:
    given = {"num_steps": STEPS, "call": call, "values": VALUES} | target
    return pab.calibrate(pipe, prompts, **given)


def attributes(pipe: Pipe) -> tuple[dict[str, Any], ...]:
    return tuple(dict(vars(part)) for part in (pipe, pipe.scheduler, pipe.transformer))


def psnr(a: Tensor, b: Tensor) -> float:
    lo, hi = VALUES
    return -10 * math.log10(float(((a - b).float().double() / (hi - lo)).square().mean()))


@pytest.mark.parametrize("name", ["ddim v", "unipc", "flow euler", "heun"])
def test_a_share_of_the_flops_gives_the_plan_that_was_measured(name: str) -> None:
    pipe = pipe_of(name)
    before = attributes(pipe)
    found = calibrated(pipe, flops=0.6)
    calls, after = pipe.transformer.calls, attributes(pipe)
    assert found.verified.share <= 0.6 and found.generations <= 20 + 1e-6
    assert {k: v for k, v in after[2].items() if k != "calls"} == {k: v for k, v in before[2].items() if k != "calls"}
    assert [vars_of.keys() for vars_of in after] == [vars_of.keys() for vars_of in before]
    assert all(x is y for x, y in zip(after[1].values(), before[1].values(), strict=True))
    call(pipe, 0.0, 0)
    steps = pipe.transformer.calls - calls
    assert calls == pytest.approx(found.generations * steps, abs=2), "all that ran was counted"
    verified = [call(pipe, PROMPTS[i], i) for i in range(3, 3 + len(found.verified.psnr))]
    pab.enable(pipe, found.config)
    ours = [call(pipe, PROMPTS[i], i, found.sampling_steps) for i in range(3, 3 + len(verified))]
    wanted = [psnr(a, b) for a, b in zip(ours, verified, strict=True)]
    assert list(found.verified.psnr) == pytest.approx(wanted, abs=1e-3)


def test_the_closest_of_the_candidates_is_chosen_and_compared_with_others() -> None:
    found = calibrated(pipe_of("unipc"), flops=0.6, most_generations=40)
    whole = [row for row in found.searched if len(row.psnr) == 3]
    closest = max(whole, key=lambda row: row.mean - 2 * math.sqrt((20 * 8**2 + 2 * row.deviation**2) / 22))
    assert len(whole) == 2 and found.verified.title == closest.title
    tried = [row.title for row in found.searched]
    assert tried[:4] == ["late", "searched", "preset", "8 steps"], tried
    assert found.everywhere.psnr == (
        *next(r.psnr for r in whole if r.title == found.verified.title),
        *found.verified.psnr,
    )
    titles = [row.title for row in found.others]
    assert titles[0] == f"{math.ceil(found.verified.share * STEPS)} steps" and "PAB 2/4/6" in titles
    shares = [share for share, _ in found.curve]
    assert shares == sorted(shares) and found.verified.title in str(found) and "generations" in str(found)


def test_plans_with_reused_sublayers_have_fitted_weights_if_a_run_is_left_for_them(tmp_path: Path) -> None:
    pipe = pipe_of("unipc")
    found = calibrated(pipe, flops=0.7, most_generations=40, folder=tmp_path)
    titles = [row.title for row in found.searched]
    assert "searched and sublayers 2 linear, fitted" in titles and found.generations <= 40
    assert pipe.transformer.calls == pytest.approx(found.generations * STEPS, abs=2), "fits were counted"
    again = pipe_of("unipc")
    assert calibrated(again, flops=0.7, most_generations=40, folder=tmp_path).config == found.config
    assert again.transformer.calls == 0
    none_left = calibrated(pipe_of("unipc"), flops=0.6)
    assert not any("fitted" in row.title for row in none_left.searched) and none_left.generations <= 20 + 1e-6


def test_a_fitted_plan_that_is_closest_is_chosen_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if any plan with fitted weights were 30 dB closer."""
    measure = Generations.measure

    def closer(self: Any, clip: Any, way: Any, *given: Any) -> Any:
        run, fitted = measure(self, clip, way, *given), None if way.config is None else way.config.fitted
        return run if fitted is None else dataclasses.replace(run, psnr=run.psnr + 30, share=0.6)

    monkeypatch.setattr(Generations, "measure", closer)
    found = calibrated(pipe_of("ddim v"), flops=0.7, most_generations=40)
    assert found.config.fitted is not None and found.verified.title.endswith(", fitted")
    assert load_config(found.save(tmp_path)[0]) == found.config and "fitted weights of 1 sublayer" in str(found)


def test_a_floor_is_kept_by_the_fewest_steps_that_were_tried() -> None:
    pipe = pipe_of("ddim v")
    found = calibrated(pipe, floor=45.0, most_generations=40, values=NARROW)
    assert found.verified.worst >= 45 and found.everywhere.expected >= 45 and found.verified.share < 1
    again = calibrated(pipe, floor=60.0, most_generations=40, values=NARROW)
    assert again.verified.worst >= 60 and again.verified.share > found.verified.share


def test_a_low_floor_skips_none_of_the_first_steps_either() -> None:
    found = calibrated(pipe_of("ddim v"), floor=5.0, values=NARROW)
    rule = found.config.rule("model", 0)
    assert rule is not None and rule.at is not None and set(range(5)) <= set(rule.at)
    assert found.verified.share == pytest.approx(10 / STEPS)


def test_the_clips_that_guess_the_first_number_of_steps_do_not_judge_a_floor() -> None:
    found = calibrated(pipe_of("ddim v"), floor=50.0, values=NARROW)
    (guess,) = found.searched
    assert guess.title == found.verified.title == "late" and len(guess.psnr) == 3
    assert len(found.verified.psnr) == 6 and found.everywhere == found.verified
    assert found.made_by["seeds"] == list(range(9)) and found.generations <= 20


def test_a_second_attempt_at_a_floor_is_verified_by_the_clips_that_are_affordable() -> None:
    found = calibrated(pipe_of("ddim v"), floor=60.0, values=NARROW)
    assert 3 <= len(found.verified.psnr) < 6 and found.generations <= 20 and found.everywhere.expected >= 60
    assert len(found.made_by["seeds"]) == 3 + len(found.verified.psnr)
    assert f"{len(found.verified.psnr)} of 6 clips verify; raise most_generations for the others" in found.notes


def test_a_plan_for_a_floor_skips_every_second_one_of_the_late_steps() -> None:
    found = calibrated(pipe_of("ddim v"), floor=60.0, values=NARROW)
    rule = found.config.rule("model", 0)
    assert rule is not None and rule.at is not None
    skipped = sorted(set(range(STEPS)) - set(rule.at))
    assert skipped == list(range(skipped[0], skipped[0] + 2 * len(skipped), 2))
    assert skipped[-1] == STEPS - 3 or skipped[0] >= STEPS // 2, "the last steps are computed before early ones are not"


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan makes is far from the full run; fewer steps without PAB are not."""
    sample = PipelineSampler.sample

    def far(self: Any, clip: Any, config: Any, steps: int, tick: Any) -> Any:
        made = sample(self, clip, config, steps, tick)
        return made if config is None else dataclasses.replace(made, result=made.result + 50)

    monkeypatch.setattr(PipelineSampler, "sample", far)


@pytest.mark.usefixtures("spoiled")
def test_a_floor_that_nothing_keeps_is_an_error_with_the_closest_plan() -> None:
    with pytest.raises(NoPlan, match=r"no plan was found that keeps floor=99 dB; the closest has \d+.\d dB") as error:
        calibrated(pipe_of("unipc"), floor=99.0)
    assert error.value.best is not None and error.value.best.worst < 99


def test_where_only_the_bound_for_unseen_clips_fails_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pab_kernels.analysis.calibration.calibration.USUAL_DEVIATION", 1000.0)
    with pytest.raises(NoPlan, match=r"on its worst clip, and 95 % of unseen ones are only expected above -\d+"):
        calibrated(pipe_of("unipc"), floor=20.0)


def bound(psnr: list[float], share: float) -> float:
    """The bound of tolerance: what 95 % of unseen clips keep, with a confidence of 95 %."""
    n, usual, z = len(psnr), 15 * (1 - share), 1.645
    f = 10 + n - 1
    mean = sum(psnr) / n
    deviation = math.sqrt((10 * usual**2 + sum((x - mean) ** 2 for x in psnr)) / f)
    a = 1 - z**2 / (2 * f)
    b = z**2 - z**2 / n
    return mean - (z + math.sqrt(z**2 - a * b)) / a * deviation


@pytest.mark.parametrize("psnr", [[50.0], [50.0, 47.0], [52.0, 44.0, 61.0, 48.0, 57.0, 50.5]])
@pytest.mark.parametrize("share", [0.4, 0.65, 1.0])
def test_what_is_expected_is_the_bound_of_tolerance(psnr: list[float], share: float) -> None:
    row = Row("", share, tuple(psnr), 1.0)
    assert row.expected == pytest.approx(bound(psnr, share), abs=1e-9)
    assert row.keeps(row.expected) and not row.keeps(row.expected + 0.01)


def test_a_floor_is_not_kept_where_one_clip_is_below_it() -> None:
    row = Row("", 1.0, (*[50.0] * 99, 44.0), 1.0)
    assert row.expected > 48 and row.keeps(44.0) and not row.keeps(44.1)


def test_more_clips_follow_the_measured_deviation() -> None:
    many = Row("", 0.5, tuple(50.0 + 14 * (i % 2) for i in range(4000)), 1.0)
    assert many.expected == pytest.approx(many.mean - 1.645 * many.deviation, abs=0.3)


@pytest.mark.parametrize("deviation", [2.0, 5.0, 7.0])
@pytest.mark.parametrize("clips", [6, 12])
def test_of_twenty_sets_of_normal_clips_one_promises_what_fewer_than_95_percent_keep(
    deviation: float, clips: int
) -> None:
    drawn = deviation * torch.randn(10000, clips, generator=torch.Generator().manual_seed(0))
    kept = -1.645 * deviation  # by 95 % of all clips
    wrong = [Row("", 0.5, tuple(known), 1.0).expected > kept for known in drawn.tolist()]
    assert sum(wrong) / len(wrong) < 0.055


def test_a_second_call_reads_what_the_first_one_kept(tmp_path: Path) -> None:
    first, second = pipe_of("unipc"), pipe_of("unipc")
    found = calibrated(first, flops=0.6, folder=tmp_path)
    again = calibrated(second, flops=0.6, folder=tmp_path)
    assert second.transformer.calls == 0 and again.to_dict() == found.to_dict()
    calibrated(pipe_of("unipc"), flops=0.6, folder=tmp_path, seed=1)
    other = pipe_of("ddim v")
    calibrated(other, flops=0.6, folder=tmp_path)
    assert other.transformer.calls > 0, "of another scheduler"


def test_what_another_version_kept_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated(pipe_of("unipc"), flops=0.6, folder=tmp_path)
    monkeypatch.setattr("pab_kernels.analysis.calibration.calibrate.version", lambda package: "0.0.1")
    later, alone = pipe_of("unipc"), pipe_of("unipc")
    calibrated(later, flops=0.6, folder=tmp_path)
    calibrated(alone, flops=0.6)
    assert later.transformer.calls == alone.transformer.calls > 0


@pytest.mark.parametrize("at", [1, 40, 130])
def test_after_an_interruption_it_goes_on_where_it_stopped(at: int, tmp_path: Path) -> None:
    pipe, seen = pipe_of("unipc"), []

    def progress(title: str, done: int, total: int | None) -> None:
        seen.append((title, done, total))
        if len(seen) == at + 1:
            raise KeyboardInterrupt

    before = attributes(pipe)
    with pytest.raises(Interrupted, match=r"interrupted after \d+.\d of \d+.\d generations"):
        calibrated(pipe, flops=0.6, folder=tmp_path, progress=progress)
    assert [v.keys() for v in attributes(pipe)] == [v.keys() for v in before]
    done = pipe.transformer.calls
    found = calibrated(pipe, flops=0.6, folder=tmp_path)
    whole = pipe_of("unipc")
    wanted = calibrated(whole, flops=0.6)
    assert found.config == wanted.config and found.verified.psnr == wanted.verified.psnr
    assert pipe.transformer.calls <= whole.transformer.calls + STEPS and done <= pipe.transformer.calls
    assert "at most" in seen[0][0] and all(d <= (t or 0) for _, d, t in seen)


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    found = calibrated(pipe_of("unipc"), flops=0.6, folder=tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    assert calibrated(pipe_of("unipc"), flops=0.6, folder=tmp_path).config == found.config


def test_a_saved_config_gives_the_same_plan(tmp_path: Path) -> None:
    found = calibrated(pipe_of("ddim v"), flops=0.6)
    written = found.save(tmp_path / "deep")
    assert [path.name for path in written][:4] == ["config.yaml", "report.json", "curve.png", "schedule.png"]
    assert all(path.stat().st_size > 200 for path in written)
    loaded = load_config(written[0])
    assert loaded == found.config and str(pab.plan(loaded, num_steps=STEPS)) == str(found.plan)
    text = written[0].read_text()
    assert text.startswith("# Found by pab.calibrate")
    for line in ("scheduler: DDIMScheduler", "scheduler_config_sha256: ", "flops: 0.6", "class: Denoiser", "torch: "):
        assert line in text, line


def test_clips_of_frames_are_drawn(tmp_path: Path) -> None:
    def frames(pipe: Pipe, prompt: float, seed: int) -> Tensor:
        return (call(pipe, prompt, seed)[:, :, :, :] / 6 + 0.5).float()

    found = calibrated(pipe_of("ddim v"), flops=0.6, call=frames, values=(0.0, 1.0))
    assert any("takes no num_steps" in note for note in found.notes)
    assert {path.name for path in found.save(tmp_path)} >= {"worst.png", "config.yaml"}


@pytest.mark.parametrize("target", [{"speed": 1.3}, {"seconds": 18.0}])
def test_targets_of_time_follow_the_seconds_of_runs(target: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a call of the model took a second, and everything else ten: a full run takes 24."""
    pipe = pipe_of("ddim v")

    def timed(run: Any) -> Any:
        calls = pipe.transformer.calls
        return run(), 10.0 + pipe.transformer.calls - calls

    monkeypatch.setattr("pab_kernels.analysis.calibration.sampler.timed", timed)
    found = calibrated(pipe, most_generations=40, **target)
    assert found.full_seconds == 24.0 and found.verified.seconds == 18.0 and found.verified.share == 8 / 14
    with pytest.raises(NoPlan, match=r"a full call takes 24.00 s already, got seconds=30; leave the model as it is"):
        calibrated(pipe, seconds=30.0)


def test_a_bare_model_is_calibrated_with_lines_on_its_own_outputs() -> None:
    model = Denoiser().double().eval().requires_grad_(False)
    found = calibrated(model, flops=0.6, call=loop)
    rule = found.config.rule("model", 0)
    assert rule is not None and rule.reuse in ("linear", "hold") and found.verified.share <= 0.6
    assert model.calls == pytest.approx(found.generations * 2 * STEPS, abs=2)
    results = []
    for config in (found.config, PABConfig()):
        pab.enable(model, config, num_steps=STEPS)
        with torch.no_grad():
            results.append(loop(model, PROMPTS[3], 3))
        pab.disable(model)
    assert found.verified.psnr[0] == pytest.approx(psnr(*results), abs=1e-3)


def lcm() -> Pipe:
    from diffusers import LCMScheduler

    pipe = pipe_of()
    pipe.scheduler = LCMScheduler()
    return pipe


def enabled() -> Pipe:
    return pab.enable(pipe_of(), PABConfig(spatial=2))


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (
            lcm,
            {},
            ValueError,
            "LCMScheduler begins from new noise at every step, .* use fewer steps, or calibrate with an",
        ),
        (enabled, {}, ValueError, "PAB is enabled on this Denoiser; call pab.disable"),
        (pipe_of, {"num_steps": 8}, ValueError, "leave the model as it is"),
        (pipe_of, {"call": lambda *_: 3}, TypeError, "call must return a tensor, got int"),
        (pipe_of, {"call": lambda *_: torch.zeros(1)}, ValueError, "did not step its DDIMScheduler"),
        (pipe_of, {"values": (1.0, 0.0)}, ValueError, "black below white"),
        (pipe_of, {"values": 3}, ValueError, "values must be two numbers, black below white, got 3"),
        (pipe_of, {"seed": "0"}, ValueError, "seed must be a whole number that fits into 64 bits, got '0'"),
        (pipe_of, {"most_generations": "20"}, ValueError, "most_generations must be a number, got '20'; usual is 20"),
        (pipe_of, {"most_generations": 3}, ValueError, "takes at least"),
        (pipe_of, {"flops": 0.12}, NoPlan, "use fewer steps as well"),
        (object, {}, TypeError, "got object; supported are a pipeline"),
        (Denoiser, {"call": None}, TypeError, "a bare Denoiser without call"),
        (Denoiser, {"call": lambda m, p, s: m(*(3 * [torch.zeros(2, 3, 4, 4)]))}, ValueError, "made 1 calls"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(make: Any, given: Any, error: Any, message: str) -> None:
    pipe = make()
    with pytest.raises(error, match=message):
        calibrated(pipe, **{"flops": 0.6, **given})
    if isinstance(pipe, Pipe) and make is not enabled:
        assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()
        assert pipe.transformer.forward.__func__ is Denoiser.forward


def test_a_wish_is_a_prompt_of_the_usual_call() -> None:
    pipe = tiny_dit()
    pipe.set_progress_bar_config(disable=True)
    wishes = [Wish(None, guidance=1.0, further={"class_labels": [i]}) for i in range(6)]
    found = pab.calibrate(pipe, wishes, num_steps=12, flops=0.7)
    assert found.verified.share <= 0.7 and len(found.verified.psnr) == 4 and len(found.worst) == 3
    assert found.made_by["seeds"] == list(range(7)) and "class_labels" in found.made_by["prompts"][0]


def test_the_usual_call_s_further_arguments_are_written_with_the_config(tmp_path: Path) -> None:
    pipe = tiny_dit()
    pipe.set_progress_bar_config(disable=True)
    wish = Wish(None, guidance=1.5, further={"class_labels": [1]})
    found = pab.calibrate(pipe, [wish], num_steps=12, flops=0.7)
    assert found.made_by["further"] == {"class_labels": [1]} and found.made_by["guidance"] == 1.5
    text = found.save(tmp_path)[0].read_text()
    assert "further:" in text and "class_labels" in text and f"sampling_steps: {found.sampling_steps}" in text


def test_full_runs_and_plans_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, order = pipe_of("ddim v"), []
    sample = PipelineSampler.sample

    def noted(self: Any, clip: Any, config: Any, steps: int, tick: Any) -> Any:
        order.append("plan" if config is not None else "full" if steps == STEPS else "fewer")
        return sample(self, clip, config, steps, tick)

    monkeypatch.setattr(PipelineSampler, "sample", noted)
    with contextlib.suppress(NoPlan):  # times of a small model are noise
        calibrated(pipe, speed=1.3)
    assert order[:4] == ["full", "plan", "full", "plan"]
    order.clear()
    calibrated(pipe_of("ddim v"), flops=0.6)
    begin = order.index("full")
    assert order[begin : begin + 8] == ["full", "plan"] * 4, "a plan is verified beside the full run of each clip"


@pytest.mark.usefixtures("spoiled")
def test_where_fewer_steps_are_closer_the_config_is_empty() -> None:
    found = calibrated(pipe_of("ddim v"), flops=0.6)
    assert found.config == PABConfig() and found.sampling_steps == 8 and found.verified.title == "8 steps"
    assert any("no plan that was tried is closer than 8 steps without PAB: sample with" in n for n in found.notes)
    assert found.plan.step_counts() is not None and "8 steps" in str(found)


def test_runs_that_enter_the_schedule_later_keep_their_steps() -> None:
    """As image-to-image does: steps count from the first one of the full schedule."""

    def later(pipe: Pipe, prompt: float, seed: int) -> Tensor:
        scheduler, begin = pipe.scheduler, 4
        scheduler.set_timesteps(STEPS + begin)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()
        for step, t in enumerate(scheduler.timesteps[begin:]):
            if step == 0 and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            x = scheduler.step(pipe.guided(x, t, step), t, x, return_dict=False)[0]
        return x

    found = calibrated(pipe_of("unipc"), flops=0.6, call=later)
    rule = found.config.rule("model", 0)
    assert rule is not None and rule.at is not None and found.begin == rule.at[0] == 4 and found.num_steps == STEPS + 4
    assert found.verified.share == pytest.approx(len(rule.at) / STEPS)


def test_a_folder_tells_weights_and_tensor_prompts_apart(tmp_path: Path) -> None:
    pipe = tiny_dit()
    pipe.set_progress_bar_config(disable=True)
    names = []
    for change in (0.0, 1e-3):
        with torch.no_grad():
            pipe.transformer.transformer_blocks[0].attn1.to_q.weight[2, 3] += change
        sampler = PipelineSampler(pipe, STEPS, None)
        store = Store(tmp_path, sampler.describe())
        prompts = [torch.zeros(1, 200, 8), torch.zeros(1, 200, 8)]
        prompts[1][0, 100, 4] = change + 1
        names += [store.name(prompt=prompt) for prompt in prompts]
        assert store.name(prompt=prompts[0].clone()) == names[-2]
    assert len(set(names)) == 4
    with pytest.raises(TypeError, match="got a prompt with a object; with folder= texts, numbers, tensors"):
        store.name(prompt=object())
    assert Store(None, {}).name(prompt=object())


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="call must return floating-point numbers, got torch.uint8"):
        pab.calibrate(
            tiny_dit(), ["a"], num_steps=12, flops=0.7, call=lambda *args: torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        )
