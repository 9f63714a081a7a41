"""The search against all schedules, and its costs against steps that are really taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from pab_kernels.analysis.calibration.influence import Influence
from pab_kernels.analysis.calibration.recording import Recording, record
from pab_kernels.analysis.calibration.schedules import Schedules, late
from pab_kernels.analysis.calibration.search import Costs, best_schedules
from pab_kernels.broadcast.coordinates import Coordinates
from pab_kernels.broadcast.forecaster import Forecaster
from pab_kernels.rules.config import PABConfig
from pab_kernels.rules.schedule import Schedule
from tests.analysis.calibration.small_pipe import STEPS, pipe_of, run_of
from tests.broadcast.forecast_oracle import NOISY, SCHEDULERS

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers


def random_costs(
    count: int, corrects: bool, holds: bool = False, twice: int | None = None, handover: int | None = None
) -> Costs:
    """Costs of made-up outputs; `twice` is a step at the noise level of the one before it."""
    rng = np.random.default_rng(count)
    vectors = rng.normal(size=(2 * count, 3 * count)).cumsum(0)
    level = [i - (twice is not None and i >= twice) for i in range(count)]
    at = tuple(Coordinates(0.3, 1.0, 0.4 * place + 0.02 * place**2) for place in level)
    influence = Influence(np.tril(rng.normal(size=(count + 1, count)), -1), at, tuple(level), corrects, handover)
    return Costs(influence, vectors @ vectors.T / vectors.shape[1], 1 + rng.random(count), holds)


def allowed(steps: Sequence[int], count: int, longest: int) -> bool:
    return all(b - a <= longest for a, b in itertools.pairwise([*steps, count]))


@pytest.mark.parametrize(("longest", "beginning", "early"), [(2, 1, 0), (4, 1, 0), (4, 3, 5)])
@pytest.mark.parametrize(
    ("corrects", "holds", "twice", "handover"),
    [(True, False, None, None), (False, False, 4, None), (True, False, 3, None), (True, False, None, 4)],
)
def test_the_programme_finds_what_trying_all_schedules_finds(
    corrects: bool, holds: bool, twice: int | None, handover: int | None, longest: int, beginning: int, early: int
) -> None:
    count = 8
    costs = random_costs(count, corrects, holds, twice, handover)
    found = best_schedules(costs, longest, beginning, early)
    for number in range(1, count + 1):
        tried = [(0, *rest) for rest in itertools.combinations(range(1, count), number - 1)]
        begun = [steps for steps in tried if steps[:beginning] == tuple(range(beginning))]
        slow = [steps for steps in begun if all({i, i + 1} & {*steps} for i in range(early - 1))]
        possible = [s for s in slow if allowed(s, count, longest) and (handover is None or handover in s)]
        assert (number in found) is bool(possible)
        if possible:
            assert found[number] == min(possible, key=costs.total)
    assert costs.total(range(count)) == 0.0


def test_what_is_held_costs_the_distance_to_it() -> None:
    costs = random_costs(6, corrects=False, holds=True)
    weights = costs.gains * costs.influence.final
    v = costs.factor[:6]
    left = weights[3] * (v[2] - v[3]) + weights[4] * (v[2] - v[4])
    assert costs.of((1, 2), 5) == pytest.approx(float(left @ left))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in NOISY])
@pytest.mark.parametrize("gap", [(3, 4, 7), (-1, 0, 2), (STEPS - 4, STEPS - 3, STEPS)])
def test_the_errors_of_a_gap_are_those_of_steps_taken_with_the_recorded_outputs(
    name: str, gap: tuple[int, int, int]
) -> None:
    """The outputs are the recorded ones, whatever the sample. In the last gap nothing is computed after s."""
    pipe = pipe_of(name)
    recording = record(pipe, run_of(pipe), lambda: None)
    count = recording.num_steps
    p, s, e = (count - STEPS + k if gap[2] == STEPS else k for k in gap)
    if "heun" in name and p > 0:  # steps 2k - 1 and 2k are of one noise level: the one before is not p
        p = s - 1 if recording.influence.places[s - 1] != recording.influence.places[s] else s - 2
    costs = Costs(recording.influence, recording.gram().numpy(), np.ones(count))
    found = costs.gap(p, s, e)
    samples = taken(pipe.scheduler, recording, range(s + 1, e))
    left = float((samples[-1] - recording.samples[-1]).square().mean().sqrt())
    assert left > 1e-6 or name == "ddim sample"
    assert recording.influence.known is (name != "ddim sample"), "its last step returns the last output"
    assert name == "ddim sample" or left == pytest.approx(float(np.linalg.norm(found)), rel=2e-3)


@pytest.mark.parametrize("name", ["ddim v", "dpm++ 2 v", "unipc", "flow euler"])
def test_nothing_is_predicted_or_corrected_from_one_model_to_the_next(name: str) -> None:
    pipe = pipe_of(name)
    recording = record(pipe, run_of(pipe), lambda: None)
    costs = Costs(replace(recording.influence, handover=7), recording.gram().numpy(), np.ones(STEPS))
    for computed in ([*range(5), *range(7, STEPS)], [*range(8), *range(10, STEPS)]):
        skipped = [i for i in range(STEPS) if i not in computed]
        samples = taken(pipe.scheduler, recording, skipped, handover=7)
        left = float((samples[-1] - recording.samples[-1]).square().mean())
        assert left > 1e-12 and left == pytest.approx(costs.total(computed), rel=4e-3)
        alone = Costs(recording.influence, recording.gram().numpy(), np.ones(STEPS)).total(computed)
        assert alone != pytest.approx(left, rel=1e-2)


def taken(scheduler: Any, recording: Recording, skipped: Sequence[int], handover: int | None = None) -> list[Tensor]:
    """The sample before each step, and the last one."""
    scheduler.set_timesteps(STEPS)
    forecaster = Forecaster(scheduler, recording.num_steps)
    samples = [recording.samples[0]]
    for i, t in enumerate(scheduler.timesteps):
        v = recording.outputs[i]
        if i == handover:  # the second model's broadcaster has its own
            forecaster = Forecaster(scheduler, recording.num_steps)
        given = (scheduler.step, i, i in skipped, frozenset[str](), v, t, samples[-1])
        samples.append(forecaster.step(*given, return_dict=False)[0])
    return samples


def test_late_steps_are_skipped_in_turn_but_not_the_last_two() -> None:
    assert late(16, 13) == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15)
    assert late(7, 4) is None and late(6, 4) == (0, 2, 4, 5)
    assert late(12, 12) is None, "nothing is skipped"
    assert late(16, 13, 4) == (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 14, 15) and late(7, 5, 4) is None


def test_for_a_floor_late_steps_are_skipped_or_those_of_the_search_if_that_is_not_possible() -> None:
    pipe = pipe_of("unipc")
    recording = record(pipe, run_of(pipe), lambda: None)
    given = ([recording], np.ones(STEPS), "forecast")
    way, few = Schedules(*given, STEPS).late(10), Schedules(*given, STEPS).late(5)
    assert way.title == "late" and way.config is not None and way.config.model is not None
    assert way.config.model.at == late(STEPS, 10) and way.share == pytest.approx(10 / STEPS)
    assert few.title == "searched", "more than every second step is skipped"
    assert Schedules(*given, STEPS).fewest_late == 10 and late(STEPS, 10)[:6] == (0, 1, 2, 3, 4, 6)
    twice = Schedules(*given, STEPS // 2)
    assert twice.late(10).title == "searched", "two steps of the schedule for one of the call"
    assert twice.fewest_late == min(twice.best)
    two = replace(recording, influence=replace(recording.influence, handover=9))
    assert Schedules([two], *given[1:], STEPS).late(10).title == "searched", "the second model's first step is skipped"


def test_no_two_steps_in_a_row_are_skipped_in_the_first_half() -> None:
    pipe = pipe_of("unipc")
    recording = record(pipe, run_of(pipe), lambda: None)
    schedules = Schedules([recording], np.ones(STEPS), "forecast", STEPS, takes_steps=True)
    for number, steps in schedules.best.items():
        part = STEPS // 2 if number >= 5 else STEPS // 4
        assert all(b - a <= 2 for a, b in itertools.pairwise(steps) if a + 2 < part), steps


def test_no_step_of_the_first_half_is_skipped_where_every_second_one_of_the_others_is_enough() -> None:
    pipe = pipe_of("ddim v")
    recording = record(pipe, run_of(pipe), lambda: None)
    schedules = Schedules([recording], np.ones(STEPS), "forecast", STEPS)
    skipped = {number: set(range(STEPS)) - {*at} for number, at in schedules.best.items()}
    alone = best_schedules(schedules.costs, early=STEPS // 2)
    assert all(min(set(range(STEPS)) - {*alone[number]}) < STEPS // 2 for number in range(10, STEPS))
    assert all(min(skipped[number]) >= STEPS // 2 and STEPS - 1 not in skipped[number] for number in (11, 12, 13))
    assert schedules.best[10] == alone[10], "the last step would be skipped"


def test_ways_are_late_and_searched_steps_presets_and_fewer_steps_with_and_without_skipped_ones() -> None:
    pipe = pipe_of("unipc")
    recording = record(pipe, run_of(pipe), lambda: None)
    given = ([recording], np.ones(STEPS), "forecast", STEPS)
    schedules = Schedules(*given, takes_steps=True)
    ways = {way.title: way for way in schedules.ways(10)}
    assert list(ways) == ["late", "searched", "preset", "10 steps", "12 steps, 10 computed", "uniform"]
    assert all(way.share <= 10 / STEPS for way in ways.values())
    plain, shorter = ways["10 steps"], ways["12 steps, 10 computed"]
    assert plain.config is None and plain.num_steps == 10 and shorter.num_steps == 12
    assert shorter.config is not None and shorter.config.model is not None and shorter.config.model.at == late(12, 10)
    assert [way.title for way in schedules.ways(7)][:2] == ["12 steps, 7 computed", "searched"], (
        "too few for late steps"
    )
    alone = [way.num_steps for way in Schedules(*given).ways(10)]
    assert set(alone) == {STEPS}, "a call that takes no num_steps"


@pytest.mark.parametrize(("number", "name"), [(13, "close"), (11, "close"), (10, "balanced"), (8, "fast")])
def test_the_preset_is_that_of_most_computed_steps_that_fits(number: int, name: str) -> None:
    pipe = pipe_of("unipc")
    recording = record(pipe, run_of(pipe), lambda: None)
    schedules = Schedules([recording], np.ones(STEPS), "forecast", STEPS)
    way, wanted = schedules.preset(number), PABConfig.preset(name).rule("model", 0)
    assert way is not None and way.config is not None and way.config.model is not None and wanted is not None
    assert set(way.config.model.at or ()) == set(range(STEPS)) - wanted.reused(Schedule(STEPS))
    assert schedules.preset(7) is None
