"""How a plan is printed, and its notes."""

from __future__ import annotations

from pab_kernels.rules.config import Broadcast, PABConfig
from pab_kernels.rules.plan import Plan, Sublayer, plan
from pab_kernels.rules.schedule import Schedule


def test_the_drawing_is_one_line_for_each_group_of_layers() -> None:
    layers = range(6)
    sublayers = [Sublayer(f"{i}.{kind}", kind, i) for i in layers for kind in ("mlp", "spatial", "cross")]
    config = PABConfig(
        spatial=Broadcast(2, (0, 1)),
        cross=Broadcast(3, (0, 1)),
        mlp=Broadcast(4, unit="step", at=[1, 20], layers=[0, 1, 2, 4]),
        rules=(("spatial", Broadcast(1, layers=[5])),),
    )
    assert str(Plan(config, Schedule(7), tuple(sublayers))) == "\n".join(
        [
            "7 steps, 6 patterns   # computed  S computed and stored  . reused",
            "spatial 0-4 S.S.S.#  4 computed, 3 reused",
            "spatial 5   #######  7 computed, 0 reused",
            "cross       S..S..#  3 computed, 4 reused",
            "mlp 0-2,4   #S...##  4 computed, 3 reused",
            "mlp 3,5     #######  7 computed, 0 reused",
            "note: mlp: steps 20 do not occur in this schedule and have no effect",
        ]
    )


def test_the_drawing_counts_what_is_skipped_and_names_the_layers_of_blocks() -> None:
    config = PABConfig(spatial=Broadcast(2, (0, 1)), block=Broadcast(2, (0, 1), layers=[1]))
    assert str(plan(config, num_steps=4)).split("\n")[1:] == [
        "spatial 1 # #   2 computed, 0 reused, 2 skipped",
        "spatial 2 S.S.  2 computed, 2 reused",
        "block 1   S.S.  2 computed, 2 reused",
    ]


def test_a_plan_of_nothing_prints() -> None:
    made = plan(PABConfig(), num_steps=3)
    assert (made.patterns, made.counts(), made.step_counts(), made.rows) == (1, {}, {}, {})
    assert str(made) == "3 steps, 1 patterns   # computed  S computed and stored  . reused"


# Notes


def _notes(config: PABConfig, *, schedule: Schedule | None = None, layers: int = 2) -> tuple[str, ...]:
    sublayers = [Sublayer(f"{i}.{kind}", kind, i) for i in range(layers) for kind in ("spatial", "mlp")]
    return Plan(config, schedule or Schedule(10), tuple(sublayers)).notes


def test_notes_name_kinds_that_the_model_lacks_once() -> None:
    config = PABConfig(spatial=2, temporal=2, rules=(("temporal", Broadcast(3, layers=[0])),))
    assert _notes(config) == ("temporal: this model has no such sublayers",)


def test_notes_do_not_ask_for_timesteps_of_rules_that_no_sublayer_has() -> None:
    in_timesteps = Broadcast(4, (100, 800), "timestep")
    overridden = PABConfig(spatial=in_timesteps, temporal=in_timesteps, rules=(("spatial", Broadcast(2)),))
    assert _notes(overridden) == ("temporal: this model has no such sublayers",)


def test_notes_name_layers_that_the_model_lacks() -> None:
    assert _notes(PABConfig(mlp=Broadcast(2, layers=[5, 6, 8]))) == ("mlp: this model has no layers 5-6,8",)
    assert _notes(PABConfig(mlp=Broadcast(2, layers=[1, 5]))) == ()


def test_notes_name_windows_in_which_nothing_is_reused() -> None:
    message = "spatial: range 2 in the window (%s) (%s) reuses no step of this schedule"
    assert _notes(PABConfig(spatial=Broadcast(2, (20, 30), "step"))) == (message % ("20, 30", "steps"),)
    assert _notes(PABConfig(spatial=Broadcast(2, (4, 5), "step"))) == (
        message % ("4, 5", "steps"),
    )  # in the window, on the beat
    assert _notes(PABConfig(spatial=Broadcast(2, (0.91, 0.99)))) == (message % ("0.91, 0.99", "fractions"),)
    ones = Schedule.of(timesteps=[v / 10 for v in range(10, 0, -1)])  # sigmas, where timesteps up to 1000 are meant
    assert _notes(PABConfig(spatial=Broadcast(2, (100, 800), "timestep")), schedule=ones) == (
        message % ("100, 800", "timesteps"),
    )


def test_notes_name_explicit_steps_before_the_entry() -> None:
    config = PABConfig(spatial=Broadcast(2, unit="step", at=[1, 5, 12]))
    assert _notes(config, schedule=Schedule(10, begin=3)) == (
        "spatial: steps 1, 12 do not occur in this schedule and have no effect",
    )


def test_notes_name_another_number_of_steps_than_the_one_that_a_rule_is_for() -> None:
    """A plan found for 20 steps would guess the last ten of 30."""
    rule = Broadcast(at=[*range(8), 9, 11, 13, 15, 17, 18, 19], unit="step", num_steps=20)
    config = PABConfig(spatial=rule)
    assert _notes(config, schedule=Schedule(20)) == _notes(config, schedule=Schedule(20, begin=8))[1:] == ()
    for steps in (12, 21, 30):
        assert _notes(config, schedule=Schedule(steps)) == (
            f"spatial: its steps are those of a schedule of 20, and this one has {steps}: sample with the number of "
            "steps that the rule is for",
        )
