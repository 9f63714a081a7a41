"""What a calibration is asked for, its clips, and how generations are spent."""

from __future__ import annotations

import math

import pytest

from pab_kernels.analysis.calibration.targets import Budget, Target, budget, check_sampling, clips_of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of floor, flops, seconds, speed, got none"),
        ({"floor": 35.0, "flops": 0.5}, "got floor=35.0, flops=0.5"),
        ({"flops": 1.0}, "flops is a share above 0.1 and below 1, got 1.0"),
        ({"floor": -1.0}, "floor is dB above 0"),
        ({"speed": 1}, "speed is a factor above 1"),
        ({"seconds": math.nan}, "seconds is seconds above 0"),
        ({"floor": "high"}, "got 'high'"),
    ],
)
def test_a_target_is_one_number_in_its_bounds(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target.of(**given)


def test_the_target_that_is_given_is_taken() -> None:
    assert Target.of(floor=None, flops=None, seconds=None, speed=1.5) == Target("speed", 1.5)
    assert str(Target.of(floor=35)) == "floor=35"


@pytest.mark.parametrize("steps", [11, 4, 0, True, 12.0])
def test_few_steps_are_left_alone(steps: object) -> None:
    with pytest.raises(ValueError, match="at least 12, got .* leave the model as it is"):
        check_sampling(steps, 0)


def test_the_first_three_clips_are_searched_with_and_each_has_its_own_seed() -> None:
    searched, verified, notes = clips_of(list("abcdefg"), 7)
    assert [(c.prompt, c.seed) for c in (*searched, *verified)] == [(p, 7 + i) for i, p in enumerate("abcdefg")]
    assert len(searched) == 3 and notes == []


def test_few_prompts_verify_with_other_seeds_and_a_note_says_so() -> None:
    searched, verified, notes = clips_of(["a"], 0)
    assert [c.seed for c in (*searched, *verified)] == [0, 1, 2, 3, 4, 5, 6] and len(verified) == 4
    assert "1 prompt(s) for 7 clips: other seeds of the same prompts verify" in notes[0]
    for prompts in ([], "a red circle"):
        with pytest.raises(ValueError, match="prompts is a list of at least one prompt"):
            clips_of(prompts, 0)


def test_a_floor_is_verified_by_more_clips_and_leaves_generations_for_a_second_attempt() -> None:
    searched, verified, notes = clips_of(list("abcdefg"), 7, 6)
    assert [c.prompt for c in verified] == list("defgab") and [c.seed for c in verified] == [10, 11, 12, 13, 14, 15]
    assert "7 prompt(s) for 9 clips" in notes[0]
    plan = budget(20, Target("floor", 40), 6, 1.5)
    assert plan.verified == 6 and plan.total == 20
    first, second = len(searched) * 1.6 + 6 * 1.65, 6 * 0.75
    assert first + second + plan.gains * 1.5 <= 20


@pytest.mark.parametrize(
    "target", [Target("flops", 0.5), Target("flops", 0.8), Target("speed", 1.5), Target("floor", 35)]
)
def test_what_is_planned_fits_and_more_generations_measure_more(target: Target) -> None:
    small, large = budget(20, target, 4, 1.5), budget(100, target, 4, 1.5)
    assert small.total <= 20 and small.verified >= 3 and small.compared >= 1 and small.ways >= 3
    assert large == Budget(2, 4, 2, 5, 2, large.total)
    with pytest.raises(
        ValueError, match=r"takes at least \d+.\d generations, got most_generations=5; raise it"
    ) as error:
        budget(5, target, 4, 1.5)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert budget(least, target, 4, 1.5).verified == 3
