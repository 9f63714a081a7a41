from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from pab_kernels.rules.config import Broadcast, PABConfig
from pab_kernels.rules.costs import Cost
from pab_kernels.rules.plan import Action, Plan, Sublayer, plan
from pab_kernels.rules.plot import COLOURS, NAMES, plot_plan
from pab_kernels.rules.schedule import Schedule


def rectangles(figure, prefix: str = "") -> dict[str, object]:
    return {p.get_gid(): p for p in figure.axes[0].patches if p.get_gid() and p.get_gid().startswith(prefix)}


@pytest.mark.parametrize(
    "drawn",
    [
        plan(PABConfig(spatial=2, temporal=4, cross=6), num_steps=20),
        plan(PABConfig(cross=3, mlp=Broadcast(2, layers=(0, 1))), num_steps=7),
        plan(PABConfig.preset("latte"), timesteps=[999 - 20 * i for i in range(50)]),
        Plan(PABConfig(spatial=2), Schedule(12, begin=4)),
        Plan(
            PABConfig(block=3, spatial=2),
            Schedule(9),
            (Sublayer("b", "block", 0), Sublayer("s", "spatial", 0, block="b")),
        ),
        plan(PABConfig(spatial=2), num_steps=1),
        plan(PABConfig(spatial=3), num_steps=150),
        plan(PABConfig(spatial=Broadcast(2, reuse="linear"), cross=Broadcast(4, reuse="linear")), num_steps=20),
    ],
    ids=["pyramid", "layers", "latte", "begin", "block", "one-step", "many-steps", "linear"],
)
def test_every_cell_is_drawn_in_the_colour_of_its_action(drawn: Plan):
    figure = plot_plan(drawn)
    cells = {gid: p for gid, p in rectangles(figure).items() if " at " in gid}
    expected = {
        f"{label} at {step}": row[step - drawn.steps.start] for label, row in drawn.grouped() for step in drawn.steps
    }
    assert cells.keys() == expected.keys()
    for gid, cell in cells.items():
        assert to_hex(cell.get_facecolor()) == COLOURS[expected[gid].action]
        assert cell.get_x() + 0.5 == int(gid.rpartition(" ")[2]) and cell.get_width() == 1


def test_rows_form_the_pyramid_with_their_counts():
    figure = plot_plan(plan(PABConfig(spatial=2, temporal=4, cross=6, mlp=2), num_steps=20))
    axes = figure.axes[0]
    labels = [
        t.get_text()
        for _, t in sorted(zip(axes.get_yticks(), axes.get_yticklabels(), strict=True), key=lambda pair: -pair[0])
    ]
    assert labels == ["cross", "temporal", "spatial", "mlp"]
    counts = [t.get_text() for t in axes.texts if t.get_text()]
    assert counts == [
        "8 computed, 12 reused",
        "10 computed, 10 reused",
        "13 computed, 7 reused",
        "13 computed, 7 reused",
    ]


def arrows(drawn: Plan) -> list[tuple[int, int]]:
    drawn_arrows = [t for t in plot_plan(drawn).axes[0].texts if not t.get_text()]
    return [(round(t.xyann[0] - 0.5), round(t.xy[0] - 0.36)) for t in drawn_arrows]


def test_an_arrow_leads_from_each_stored_output_to_its_last_reuse():
    drawn = plan(PABConfig(cross=4), num_steps=10)
    ends = arrows(drawn)
    row = drawn.rows["cross"]
    lasts = [(d.reads[0], i) for i, d in enumerate(row) if d.action is Action.REUSE and not d.held]
    assert ends == lasts and len(ends) > 1


def test_arrows_of_a_linear_reuse_are_those_of_a_hold():
    assert arrows(plan(PABConfig(cross=Broadcast(4, reuse="linear")), num_steps=20)) == arrows(
        plan(PABConfig(cross=4), num_steps=20)
    )


@pytest.mark.parametrize(("exact", "first"), [(False, 2), (True, 1)])
def test_the_window_is_shaded_where_the_rule_reads_a_fractional_timestep(exact: bool, first: int):
    rule = Broadcast(2, (100, 800), "timestep", exact=exact)  # 798.9 is 800 in bfloat16
    figure = plot_plan(plan(PABConfig(spatial=rule), timesteps=(900.0, 798.9, 700.0, 600.0, 500.0, 50.0)))
    shaded = rectangles(figure, "window")["window of spatial"]
    assert (shaded.get_x() + 0.5, shaded.get_width()) == (first, 5 - first)


def test_the_window_is_shaded_where_a_rule_has_one():
    figure = plot_plan(plan(PABConfig(spatial=2, mlp=Broadcast(2, unit="step", at=(3,)), cross=1), num_steps=20))
    windows = rectangles(figure, "window")
    assert windows.keys() == {"window of spatial"}
    shaded = windows["window of spatial"]
    assert (shaded.get_x(), shaded.get_x() + shaded.get_width()) == (2.5, 16.5)  # steps 3 to 16 of 20


def test_the_legend_names_what_is_there():
    figure = plot_plan(plan(PABConfig(spatial=1), num_steps=5))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [NAMES[Action.COMPUTE]]
    figure = plot_plan(plan(PABConfig(spatial=2), num_steps=9))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "computed",
        "computed and stored",
        "reused",
        "window",
    ]


def test_bytes_kept_are_drawn_below_by_kind():
    drawn = plan(PABConfig(spatial=2, cross=4), num_steps=12)
    costs = {"spatial": Cost(1, 3 * 2**30), "cross": Cost(1, 2**30)}
    cost = drawn.forecast(costs)
    pyramid, kept = plot_plan(drawn, cost=cost).axes
    heights = {kind: [bar.get_height() for bar in bars] for kind, bars in zip(costs, kept.containers, strict=True)}
    assert heights == {kind: [n / 2**30 for n in cost.cache_bytes_by_kind[kind]] for kind in costs}
    assert kept.get_ylabel() == "kept, GiB" and pyramid.get_xlim() == kept.get_xlim()


def test_bytes_in_host_memory_are_drawn_above_those_on_the_device():
    rules = PABConfig(spatial=2, cross=4, cache_device="cpu")
    drawn = plan(rules, num_steps=12)
    cost = drawn.forecast({"spatial": Cost(1, 3 * 2**30), "cross": Cost(1, 2**30)})
    _, kept = plot_plan(drawn, cost=cost).axes
    labels = [text.get_text() for text in kept.get_legend().get_texts()]
    assert labels == ["spatial in host memory", "cross in host memory"]
    heights = [[bar.get_height() for bar in bars] for bars in kept.containers]
    assert heights == [[n / 2**30 for n in cost.host_bytes_by_kind[kind]] for kind in ("spatial", "cross")]


def test_it_is_saved_and_stays_out_of_pyplot(tmp_path):
    drawn = plan(PABConfig(spatial=2), num_steps=8)
    figure = drawn.plot(str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG") and figure.canvas.manager is None
    drawn.plot(str(tmp_path / "plan.svg"))
    assert "sampling step" in (tmp_path / "plan.svg").read_text() or (tmp_path / "plan.svg").stat().st_size > 1000


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"drawing a plan needs the package matplotlib.*pip install 'pab-kernels\[demo\]'"
    ):
        plot_plan(plan(PABConfig(spatial=2), num_steps=4))
