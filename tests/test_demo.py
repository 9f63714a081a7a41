from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("imageio")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")


from pab_kernels import demo
from pab_kernels.analysis.quality.comparison import Closeness, Comparison
from pab_kernels.analysis.sampling import Peak, Sampled
from pab_kernels.demo import DemoResult, DemoRun, DemoSettings, Variant, run_demo, variants, write
from pab_kernels.models.demo import calibrated, shapes
from pab_kernels.rules.config import PABConfig

# diffusers' schedulers hand tensors to numpy in a way that numpy 2.4 says is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("measured_once"),
]

ONE = ("a red circle moves right at night",)

STEPS = 12
"""The fewest that the presets skip any of."""


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run_demo(DemoSettings(ONE, steps=STEPS, ranges=(1, 1, 1), device="cpu"))


def run_of(result: DemoResult, key: str) -> DemoRun:
    return next(run for run in result.runs if run.variant.key == key)


def test_the_default_prompts_were_never_trained_on():
    settings = DemoSettings()
    assert set(settings.captions) < set(shapes.held_out())
    for slot in shapes.VOCABULARY:  # and differ
        assert len({getattr(caption, slot) for caption in settings.captions}) >= 3


def test_the_plan_of_calibrate_comes_first_where_it_was_found_for_the_schedule():
    found = calibrated()
    assert found is not None and found.rule("model", 0).reuse == "forecast"
    first = variants(DemoSettings())[1]
    assert (first.key, first.config) == ("calibrated", found)
    for other in ({"steps": 30}, {"scheduler": "dpm++"}, {"guidance": 2.0}):
        assert calibrated(**other) is None and variants(DemoSettings(**other))[1].key == "fast"


def test_the_plan_was_found_on_other_captions():
    text = (Path(demo.__file__).parent / "models" / "demo" / "calibrated.yaml").read_text()
    assert not any(prompt in text for prompt in demo.PROMPTS) and "prompts:" in text


def test_every_variant_runs_in_order(result: DemoResult):
    keys = [run.variant.key for run in result.runs]
    assert keys[:6] == ["full", "fast", "balanced", "pab246", "diffusers246", "ranges"] and not result.interrupted
    assert all(key.startswith("fewer-") for key in keys[6:]) and len(keys) > 6
    assert all(
        run.sampled.output.shape == (1, 8, 3, 32, 32) and run.sampled.seconds > 0 and run.shown in (0, 1)
        for run in result.runs
    )


def test_the_reference_computes_everything_and_has_no_quality(result: DemoResult):
    full = run_of(result, "full")
    assert all(c.computed == STEPS and c.reused == 0 for c in full.counts.values()) and list(full.counts) == list(
        demo.COUNTED_KINDS
    )
    assert full.cache_bytes == 0 and full.quality == () and math.isnan(full.spread("psnr")[0])


def test_ranges_of_one_give_the_clips_of_no_pab(result: DemoResult):
    ranges = run_of(result, "ranges")
    assert torch.equal(ranges.sampled.output, run_of(result, "full").sampled.output)
    assert (
        ranges.spread("psnr")[0] == math.inf
        and ranges.flops == run_of(result, "full").flops
        and ranges.cache_bytes == 0
    )


def test_pab_saves_work_and_counts_it(result: DemoResult):
    full, paper = run_of(result, "full"), run_of(result, "pab246")
    planned = PABConfig.preset("pab246")
    assert paper.plan is not None and paper.plan.config == planned
    assert {kind: (c.computed, c.reused) for kind, c in paper.counts.items()} == {
        "model": (12, 0),
        "spatial": (8, 4),
        "temporal": (5, 7),
        "cross": (4, 8),
        "mlp": (12, 0),
    }
    assert 0 < paper.flops < full.flops and paper.cache_bytes > 0 and math.isfinite(paper.spread("psnr")[0])


def test_diffusers_pab_with_the_same_ranges_agrees_in_pictures_counts_and_work(result: DemoResult):
    ours, theirs = run_of(result, "pab246"), run_of(result, "diffusers246")
    assert torch.allclose(ours.sampled.output, theirs.sampled.output, atol=2e-3)
    assert {k: (c.computed, c.reused) for k, c in ours.counts.items()} == {
        k: (c.computed, c.reused) for k, c in theirs.counts.items()
    }
    assert theirs.flops == ours.flops
    assert theirs.cache_bytes >= ours.cache_bytes > 0


def test_fewer_steps_have_at_least_the_flops_of_their_pab_run(result: DemoResult):
    for run in result.runs:
        if run.variant.like:
            assert 1 <= run.steps < STEPS and run.title.startswith(f"{run.steps} steps, as ")
            per_step = run.flops / run.steps
            like = run_of(result, run.variant.like).flops
            assert like <= run.flops < like + per_step


def test_everything_is_written(result: DemoResult, tmp_path):
    written = write(result, tmp_path / "new" / "folder", scale=4)
    assert [path.name for path in written] == [
        "clips.gif",
        "clips.mp4",
        "schedule-fast.png",
        "schedule-balanced.png",
        "schedule-pab246.png",
        "schedule-ranges.png",
        "results.json",
    ]
    assert all(path.stat().st_size > 500 for path in written)
    data = json.loads(written[-1].read_text(), parse_constant=pytest.fail)  # no NaN or Infinity
    assert data["prompts"] == list(ONE) and data["seeds"] == [0] and len(data["weights"]["sha256"]) == 64
    records = {record["key"]: record for record in data["runs"]}
    assert records["full"]["psnr"] is None and records["ranges"]["psnr"] == {"mean": None, "std": 0.0, "clips": [None]}
    assert records["pab246"]["reused"] == {"model": 0, "spatial": 4, "temporal": 7, "cross": 8, "mlp": 0}
    assert (records["balanced"]["computed"]["model"], records["balanced"]["reused"]["model"]) == (8, 4)
    assert 0 < records["pab246"]["flops_share"] < 1 and records["full"]["speedup"] == 1


def test_progress_counts_all_steps_of_all_runs():
    seen = []
    result = run_demo(
        DemoSettings(ONE, steps=2, device="cpu"), lambda title, done, todo: seen.append((title, done, todo))
    )
    calls = sum(run.calls for run in result.runs)
    assert sorted({done for _, done, _ in seen}) == list(range(1, calls + 1))
    assert seen[-1][1] == seen[-1][2] and seen[0][0] == "no PAB"


@pytest.mark.parametrize("during", ["full", "balanced", "diffusers246"])
def test_an_interruption_keeps_the_finished_runs(during: str, tmp_path):
    settings = DemoSettings(ONE, steps=2, device="cpu")
    titles = {variant.title: variant.key for variant in variants(settings)}

    def interrupt(title: str, done: int, todo: int) -> None:
        if titles[title] == during:
            raise KeyboardInterrupt

    result = run_demo(settings, interrupt)
    order = ["full", "fast", "balanced", "pab246", "diffusers246"]
    assert result.interrupted and [run.variant.key for run in result.runs] == order[: order.index(during)]
    if result.runs:
        written = write(result, tmp_path)
        assert json.loads(written[-1].read_text())["interrupted"] is True


def test_each_clip_has_the_next_seed():
    assert list(DemoSettings(ONE * 3, seed=4).seeds) == [4, 5, 6]


def test_spread_is_mean_and_deviation():
    def spread(*values: float) -> tuple[float, float]:
        quality = tuple(Comparison("A", "B", 8, 8, Closeness(value, 1.0, None, None, None), ()) for value in values)
        sampled = Sampled(torch.zeros(len(values), 1, 3, 8, 8), 1.0, Peak(), None)
        return DemoRun(Variant("a", "b"), 2, 2, sampled, 1, {}, 0, 0, quality).spread("psnr")

    assert spread(1.0, 3.0) == (2.0, pytest.approx(math.sqrt(2)))
    assert spread(5.0) == (5.0, 0.0) and spread(5.0, math.inf) == (math.inf, 0.0)


def test_a_fourth_range_is_the_mlps():
    config = next(v for v in variants(DemoSettings(ONE, ranges=(2, 3, 4, 5))) if v.key == "ranges").config
    assert config == PABConfig(spatial=2, temporal=3, cross=4, mlp=5)
    assert Variant("a", "b").config is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": ("a red dog",)}, "does not know the word 'dog'"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"ranges": (2, 4)}, r"three or four whole numbers of at least 1: spatial,temporal,cross\[,mlp\]; got 2,4"),
        ({"ranges": (2, 0, 6)}, "got 2,0,6"),
        ({"scheduler": "magic"}, "no scheduler 'magic'; it has ddim"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**arguments)
