"""Presets give the computed steps that were published, and say where an MLP table does not fit."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

import pab_kernels as pab
from pab_kernels.rules.config import Broadcast, PABConfig
from pab_kernels.rules.plan import Action, Plan, plan
from pab_kernels.rules.presets import default_preset, presets
from tests.broadcast.toy import EVERY_STEP, toy


def _shifted(r: float, num_steps: int = 30) -> list[float]:
    """Open-Sora's timesteps: `t = 1 - i / N`, shifted by r."""
    return [1000 * r * t / (1 + (r - 1) * t) for t in (1 - i / num_steps for i in range(num_steps))]


def _open_sora_timesteps(height: int, width: int, frames: int) -> list[float]:
    return _shifted(math.sqrt(height * width / 512**2) * math.sqrt(frames // 17 * 5))


@pytest.mark.parametrize(
    ("height", "width", "frames", "computed", "mlps_reused"),
    [
        (480, 854, 51, (21, 17, 16), 6),
        (480, 854, 102, (22, 18, 17), 2),
        (480, 854, 204, (22, 18, 17), 2),
        (720, 1280, 51, (22, 18, 17), 2),
        (720, 1280, 102, (23, 19, 18), 2),
    ],
)
def test_open_sora_computes_the_published_steps(
    height: int, width: int, frames: int, computed: tuple[int, int, int], mlps_reused: int
) -> None:
    timesteps = _open_sora_timesteps(height, width, frames)
    made = plan(PABConfig.preset("open-sora-1.2"), timesteps=timesteps)
    counts = made.step_counts()
    assert tuple(counts[kind].computed for kind in ("spatial", "temporal", "cross")) == computed
    assert all(c.computed + c.reused == 30 for c in counts.values())
    assert counts["mlp"].reused == mlps_reused
    assert made.notes == ()
    rounded = [int(t) for t in torch.tensor(timesteps, dtype=torch.float32).bfloat16().tolist()]
    assert _mlp_steps(made)["STORE"] == [i for i, t in enumerate(rounded) if t in (676, 788, 864)]
    for kind, reach in (("spatial", 2), ("temporal", 4), ("cross", 6)):
        inside = [i for i, t in enumerate(rounded) if i % reach and 450 < t < 930]
        assert [i for i, d in enumerate(made.rows[kind]) if d.action is Action.REUSE] == inside


def test_open_sora_plan_1_2_compares_fractional_timesteps_as_they_are() -> None:
    """Its sampler has 100.909, which is 101 in bfloat16: within the window, where 100 is not."""
    timesteps = [999 * i / 99 for i in range(99, -1, -1)]
    made = plan(PABConfig.preset("open-sora-plan-1.2"), timesteps=timesteps)
    reused = [i for i, d in enumerate(made.rows["spatial"]) if d.action is Action.REUSE]
    assert reused == [i for i, t in enumerate(timesteps) if i % 2 and 100 < int(t) < 850]
    assert 89 not in reused


def _in_timesteps(lo: int, hi: int, exact: bool = False, **ranges: int) -> dict[str, Broadcast]:
    return {kind: Broadcast(reach, (lo, hi), "timestep", exact=exact) for kind, reach in ranges.items()}


def _table(points: list[int], layers: int) -> Broadcast:
    return Broadcast(3, unit="timestep", at=points, layers=range(layers))


_PLAN_TABLE = [738, 714, 690, 666, 642, 618, 594, 570, 546, 522, 498, 474, 450, 426]
PUBLISHED = {
    "open-sora-1.2": PABConfig(
        **_in_timesteps(450, 930, spatial=2, temporal=4, cross=6),
        mlp=_table([676, 788, 864], 5),
        cache_point="post_gate",
    ),
    "open-sora-plan-1.1": PABConfig(
        **_in_timesteps(100, 850, spatial=2, temporal=4, cross=6), mlp=_table(_PLAN_TABLE, 7), cache_point="post_gate"
    ),
    "open-sora-plan-1.2": PABConfig(**_in_timesteps(100, 850, exact=True, spatial=2, cross=6)),
    "latte": PABConfig(
        **_in_timesteps(100, 800, spatial=2, temporal=3, cross=6),
        mlp=_table([720, 640, 560, 480, 400], 5),
        cache_point="post_gate",
    ),
    "cogvideox": PABConfig(**_in_timesteps(100, 850, spatial=2)),
    "vchitect": PABConfig(**_in_timesteps(100, 800, spatial=2, temporal=4, cross=6)),
    "pab246": PABConfig(spatial=2, temporal=4, cross=6),
    "pab357": PABConfig(spatial=3, temporal=5, cross=7),
    "pab579": PABConfig(spatial=5, temporal=7, cross=9),
}


def test_presets_are_the_published_settings() -> None:
    ours = {"demo", "close", "balanced", "balanced-line", "fast"}  # for the model of the package, and for any model
    assert {name: config for name, config in presets().items() if name not in ours} == PUBLISHED
    assert presets().keys() == PUBLISHED.keys() | ours
    assert all(PABConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config for config in presets().values())


@pytest.mark.parametrize(("name", "computed"), [("close", 24), ("balanced", 20), ("fast", 17)])
def test_presets_that_skip_the_model_run_so_many_of_30_steps(name: str, computed: int) -> None:
    made = plan(PABConfig.preset(name), num_steps=30)
    assert made.step_counts()["model"].computed == computed
    assert all(rule.reuse == "forecast" for _, rule in made.config.broadcasts())


def test_presets_cannot_be_changed_through_the_dict_that_lists_them() -> None:
    presets().clear()
    assert PABConfig.preset("latte") == PUBLISHED["latte"]


def test_an_unknown_preset_is_refused_in_one_line_that_lists_them() -> None:
    with pytest.raises(
        ValueError,
        match="there is no preset 'pab'; supported are balanced, balanced-line, close, cogvideox, demo, .*vchitect",
    ) as error:
        PABConfig.preset("pab")
    assert "\n" not in str(error.value)


# The MLP tables, which name timesteps of one schedule each


def _mlp_steps(made: Plan) -> dict[str, list[int]]:
    row = made.rows["mlp.0"]
    return {
        action.name: [i for i, d in enumerate(row) if d.action is action] for action in (Action.STORE, Action.REUSE)
    }


def test_the_latte_table_occurs_in_fifty_ddim_steps() -> None:
    made = plan(PABConfig.preset("latte"), timesteps=range(980, -1, -20))
    stored = [13, 17, 21, 25, 29]  # 720, 640, 560, 480, 400
    assert _mlp_steps(made) == {"STORE": stored, "REUSE": sorted(i + k for i in stored for k in (1, 2))}
    assert made.notes == ()
    reused_at_14 = {
        s.layer for s in made.sublayers if s.kind == "mlp" and made.decision(s.name, 14).action is Action.REUSE
    }
    assert reused_at_14 == {0, 1, 2, 3, 4}


def test_the_open_sora_plan_table_occurs_in_its_150_steps() -> None:
    made = plan(PABConfig.preset("open-sora-plan-1.1"), timesteps=range(894, -1, -6))
    stored = [(894 - t) // 6 for t in _PLAN_TABLE]
    assert _mlp_steps(made) == {"STORE": stored, "REUSE": sorted(i + k for i in stored for k in (1, 2))}
    assert made.notes == ()


def test_the_open_sora_table_occurs_in_its_schedule() -> None:
    made = plan(PABConfig.preset("open-sora-1.2"), timesteps=_shifted(4.887))
    assert len(_mlp_steps(made)["STORE"]) == 3
    assert made.notes == ()


@pytest.mark.parametrize(
    ("name", "timesteps", "missing"),
    [
        ("latte", range(981, 0, -20), "400, 480, 560, 640, 720"),  # steps_offset=1
        ("latte", range(960, -1, -40), ""),  # 25 steps: all five are still there
        ("latte", range(970, -1, -30), ""),  # two of them are
        ("open-sora-1.2", range(980, -1, -20), "676, 788, 864"),
        ("open-sora-1.2", _open_sora_timesteps(720, 1280, 51), ""),
    ],
)
def test_a_table_none_of_whose_timesteps_occurs_is_noted(name: str, timesteps: list[float], missing: str) -> None:
    made = plan(PABConfig.preset(name), timesteps=timesteps)
    expected = (f"mlp: timesteps {missing} do not occur in this schedule and have no effect",) if missing else ()
    assert made.notes == expected
    assert bool(_mlp_steps(made)["STORE"]) == (not missing)


# The default


def test_the_default_skips_the_model_with_forecasts_where_a_scheduler_is_followed() -> None:
    assert default_preset(follows_scheduler=True) == PABConfig.preset("balanced")
    line = default_preset(follows_scheduler=False)
    assert [(kind, rule.reuse) for kind, rule in line.broadcasts()] == [("model", "linear")]
    assert plan(line, num_steps=30).step_counts()["model"].computed == 20


def test_rules_without_effect_are_a_warning_where_somebody_wrote_them_for_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A preset is for many models: of its rules one reads with INFO."""
    caplog.set_level(logging.INFO, "pab_kernels")
    written = PABConfig(spatial=Broadcast(2, EVERY_STEP), temporal=Broadcast(4, EVERY_STEP))
    for config, level in ((PABConfig.preset("pab246"), logging.INFO), (written, logging.WARNING)):
        caplog.clear()
        pab.enable(toy(), config, num_steps=8)
        assert [
            r.levelno for r in caplog.records if "temporal: this model has no such sublayers" in r.getMessage()
        ] == [level]
