"""Latency of Open-Sora 1.2 on several GPUs, on paper: what is measured or assumed of the parts, added up.

    python -m bench.parallel --out bench/results/parallel-model.jsonl
    python -m bench.parallel --parts parts.json --bandwidth 250

A step takes as long as the host needs to launch it, or as long as the device needs, if that is longer:

    device = sum over kinds of (share of its sublayers that is computed) seconds(kind) + seconds(rest)
             + bytes / bandwidth + messages * call

Seconds are those of a rank's rows: measured with as many, or with the next larger number in proportion. Bytes and
messages come from `pab_kernels.rules.traffic`. First the model has to give the two latencies of PAB that its paper
prints, from the paper's other figures. Then it tells what this package needs to be 26 times as fast as the eager
baseline on eight GPUs, and what more of them would give. Nothing in it is fitted to the latencies that it should give.

A file for `--parts` is a JSON object: `steps`, a list of objects with `rows` (the share of the rows: 1 for all, 0.125
for an eighth) and seconds of a step by kind ("spatial", "temporal", "cross", "mlp", "rest"), for 204 frames at 480p;
`fixed`, seconds of a generation beside its steps; `host`, seconds to launch a step that computes all attention and one
that reuses all of it; `source`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pab_kernels import PABConfig
from pab_kernels.models.open_sora import schedule as open_sora
from pab_kernels.rules.plan import Action, Plan, Sublayer
from pab_kernels.rules.schedule import Schedule
from pab_kernels.rules.traffic import OUTPUT, Layout, Shapes, Traffic, part, traffic

from .record import ROOT, read, write

Row = dict[str, Any]
Size = tuple[int, int, int]

TWO_SECONDS, EIGHT_SECONDS, STEPS, DEPTH = (51, 480, 854), (204, 480, 854), 30, 28
KINDS = ("spatial", "temporal", "cross", "mlp")

# arXiv 2408.12588: Open-Sora 1.2 at 480p on H100 GPUs, ranges 2/4/6 and a table of MLPs, seconds of a generation
FULL_2S, PAB_2S = 26.54, 19.87
WITHOUT_2S = {"spatial": 21.74, "temporal": 23.95, "cross": 20.98, "mlp": 20.27}
"""With PAB, but for one kind."""
FULL_8S, PAB_8S = {1: 97.51, 8: 12.01}, {1: 71.25, 8: 9.29}
"""By GPUs; on eight with dynamic sequence parallelism in bfloat16."""
AIM = 26
"""Times as fast as the eager baseline, which is FULL_8S on one GPU."""

LADDER = (
    ("published schedule on fused operations", 2.17),
    ("+ faster attention of 72 channels, CUDA graphs", 2.36),
    ("+ GELU in the MLP's first product", 2.61),
    ("+ every second MLP in the window", 3.09),
    ("published schedule + every third block, GELU as above", 3.48),
)
"""Times as fast as the eager baseline on one GPU, as modelled for clips of 2 s: `bench.end_to_end`."""


@dataclass(frozen=True)
class Links:
    """How fast a rank sends.

    Args:
        bandwidth: bytes a second to ranks of its node.
        network: bytes a second to those of other nodes.
        call: seconds of a collective beside its bytes.
        node: ranks of a node.
    """

    bandwidth: float = 300e9
    network: float = 40e9
    call: float = 20e-6
    node: int = 8

    def seconds(self, bytes_: int, messages: int, group: int) -> float:
        """Of bytes that go evenly to the others of `group` ranks, which fill nodes; both links work at once."""
        near = min(group, self.node)
        inside, outside = bytes_ * (near - 1) / max(group - 1, 1), bytes_ * (group - near) / max(group - 1, 1)
        return max(inside / self.bandwidth, outside / self.network) + messages * self.call


@dataclass(frozen=True)
class Parts:
    """The parts of a latency.

    Args:
        steps: seconds of a step by kind, with "rest" for all else, by the share of the rows that a rank has.
        fixed: seconds of a generation beside its steps.
        host: seconds to launch a step that computes and keeps all attention, and one that reuses all of it.
        source: of these figures.
    """

    steps: Mapping[float, Mapping[str, float]]
    fixed: float = 0.0
    host: tuple[float, float] = (0.0, 0.0)
    source: str = ""

    def at(self, share: float) -> dict[str, float]:
        """Seconds of a step with a share of the rows, by kind."""
        known = min(rows for rows in self.steps if rows >= 0.99 * share)
        return {kind: seconds * share / known for kind, seconds in self.steps[known].items()}

    @classmethod
    def read(cls, path: str | Path) -> Parts:
        """The parts in a file; see above."""
        data = json.loads(Path(path).read_text())
        steps = {row.pop("rows", None): row for row in data.get("steps", ())}
        if 1 not in steps or any(set(row) - {*KINDS, "rest"} for row in steps.values()):
            raise ValueError(f"{path}: `steps` needs an object with rows 1, and seconds of {', '.join(KINDS)} or rest")
        return cls(steps, data.get("fixed", 0.0), tuple(data.get("host", (0.0, 0.0))), data.get("source", str(path)))


@dataclass(frozen=True)
class Latency:
    """Seconds of a generation: computing, sending, waits of the device for the host, and `Parts.fixed`."""

    computing: float
    sent: float
    waits: float
    fixed: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.computing + self.sent + self.waits + self.fixed


def plan_of(config: PABConfig, size: Size) -> Plan:
    """The plan of Open-Sora's 30 steps."""
    timesteps = [1000 * sigma for sigma in open_sora.sigmas(STEPS, open_sora.shift(*size))]
    names = ("spatial", "cross", "mlp", "temporal", "cross", "mlp")
    sublayers = [
        Sublayer(f"{layer}.{place}", kind, layer) for layer in range(DEPTH) for place, kind in enumerate(names)
    ]
    return Plan(config, Schedule.of(timesteps=timesteps), tuple(sublayers))


def shapes_of(size: Size) -> Shapes:
    """Of a call with both branches in bfloat16; the output is in float32."""
    frames, height, width = open_sora.latent_size(*size)
    places = part(height, 2) * part(width, 2)
    return Shapes(2, frames, places, 1152, 2, 8 * height * width * 4)


def computed(plan: Plan) -> list[dict[str, float]]:
    """The share of each kind's sublayers that is computed, by step."""
    rows = {kind: [plan.rows[s.name] for s in plan.sublayers if s.kind == kind] for kind in KINDS}
    run = (Action.COMPUTE, Action.STORE)
    return [
        {kind: sum(row[i].action in run for row in of) / len(of) for kind, of in rows.items()} for i in range(STEPS)
    ]


def reused(plan: Plan) -> dict[str, float]:
    """Steps at which each kind is reused, as if all of its sublayers were reused alike."""
    return {kind: sum(1 - step[kind] for step in computed(plan)) for kind in KINDS}


def share_of(layout: Layout, shapes: Shapes) -> float:
    """The share of all rows that a rank has, padding included."""
    return part(shapes.frames, layout.sequence) / shapes.frames / layout.cfg


def sending(found: Traffic, layout: Layout, links: Links) -> list[float]:
    """Seconds of sending, by step."""
    groups = {kind: layout.ranks if kind == OUTPUT else layout.sequence for kind in found.sent}
    return [
        sum(links.seconds(sent[i].bytes, sent[i].messages, groups[kind]) for kind, sent in found.sent.items())
        for i in range(STEPS)
    ]


def latency(parts: Parts, config: PABConfig, layout: Layout, links: Links) -> Latency:
    """Of a clip of 8 s.

    Args:
        parts: of the model, as it runs under `config`.
        config: rules for sublayers.
        layout: of the ranks.
        links: between them.
    """
    plan, shapes = plan_of(config, EIGHT_SECONDS), shapes_of(EIGHT_SECONDS)
    seconds = parts.at(share_of(layout, shapes))
    sent = sending(traffic(layout, "frames", shapes, plan), layout, links)
    computing = waits = 0.0
    for step, on_the_way in zip(computed(plan), sent, strict=True):
        busy = seconds.get("rest", 0.0) + sum(step[kind] * seconds.get(kind, 0.0) for kind in KINDS)
        attention = sum(step[kind] for kind in KINDS[:3]) / 3
        launching = parts.host[1] + attention * (parts.host[0] - parts.host[1])
        computing += busy
        waits += max(launching - busy - on_the_way, 0.0)
    return Latency(computing, sum(sent), waits, parts.fixed)


# The published latencies


def published_parts(links: Links, own: bool = True, linear: bool = False) -> Parts:
    """Parts of the published code on one and eight GPUs, from its latencies without PAB and its ablations.

    1. A kind takes (latency without it - latency of PAB) / (steps at which it is reused) seconds a step, at 2 s, and as
       many times more as there are more tokens: rows are independent, and attention over frames is a small part.
    2. The rest of a step is what is missing to the latency without PAB, which is published for one and eight GPUs.
    3. The four savings together are more than what PAB saves: the difference is PAB's own cost. Its code waits for the
       device three times in each block, whatever the clip and the ranks: `fixed`.

    Args:
        links: between the GPUs.
        own: whether the difference of 3. is a cost of its own; else all savings are smaller in proportion.
        linear: whether the latency without PAB on eight GPUs is an eighth of that on one GPU and the time of sending,
            with padding, instead of the published one.
    """
    config, shapes, layout = PABConfig.preset("open-sora-1.2"), shapes_of(EIGHT_SECONDS), Layout(1, 8)
    steps, tokens = reused(plan_of(config, TWO_SECONDS)), EIGHT_SECONDS[0] / TWO_SECONDS[0]
    saved = {kind: seconds - PAB_2S for kind, seconds in WITHOUT_2S.items()}
    surplus = sum(saved.values()) - (FULL_2S - PAB_2S)
    factor = tokens if own else tokens * (1 - surplus / sum(saved.values()))
    each = {kind: factor * saved[kind] / steps[kind] for kind in KINDS}
    everything = sum(each.values())
    one = {**each, "rest": FULL_8S[1] / STEPS - everything}
    share = share_of(layout, shapes)
    eighth = {kind: seconds * share for kind, seconds in one.items()}
    if not linear:
        sent = sum(sending(traffic(layout, "frames", shapes, plan_of(PABConfig(), EIGHT_SECONDS)), layout, links))
        eighth["rest"] = (FULL_8S[8] - sent) / STEPS - everything * share
    return Parts({1.0: one, share: eighth}, fixed=surplus if own else 0.0, source="arXiv 2408.12588")


PUBLISHED = PABConfig.preset("open-sora-1.2")
READINGS = {
    "PAB has a cost of its own": {},
    "savings shrink in proportion": {"own": False},
    "eight GPUs are an eighth of one": {"linear": True},
}
"""Of the published figures; the first is the one that is used."""


def check(links: Links) -> Iterator[Row]:
    """The published latencies of PAB beside what the model gives, by reading."""
    for reading, options in READINGS.items():
        parts = published_parts(links, **options)
        for gpus, published in PAB_8S.items():
            found, plain = (latency(parts, config, Layout(1, gpus), links) for config in (PUBLISHED, PABConfig()))
            row = _row(found, miss=found.seconds / published - 1, without_pab=plain.seconds - plain.fixed)
            yield {"part": "check", "reading": reading, "gpus": gpus, "published": published} | row


# Ours


def assumed_parts(ratio: float, host: tuple[float, float] = (0.0, 0.0)) -> Parts:
    """Parts of this package that are not measured: the eager baseline on one GPU, so many times as fast.

    The ratio has the savings of the published schedule in it, so all is "rest".
    """
    return Parts({1.0: {"rest": FULL_8S[1] / STEPS / ratio}}, host=host, source="modelled for 2 s: bench.end_to_end")


def measured_host() -> tuple[float, float]:
    """Seconds to launch a step of STDiT3 that keeps all attention, and one that reuses it, on the CPU of the file."""
    rows = read([ROOT / "bench/results/host-cpu.jsonl"])
    found = {row["variant"]: row["milliseconds"] / 1000 for row in rows if row["model"] == "stdit3"}
    return found["compute and store"], found["reuse"]


LAYOUTS = {
    "sequence 8, bfloat16": Layout(1, 8),
    "cfg 2 x sequence 4, bfloat16": Layout(2, 4),
    "cfg 2 x sequence 4, 8-bit return": Layout(2, 4, None, "int8"),
    "cfg 2 x sequence 4, 8 bits both ways": Layout(2, 4, "int8", "int8"),
}


def needs(links: Links) -> Iterator[Row]:
    """By layout, how much faster than the eager baseline one GPU has to be for `AIM` on eight."""
    shapes, plan = shapes_of(EIGHT_SECONDS), plan_of(PUBLISHED, EIGHT_SECONDS)
    for name, layout in LAYOUTS.items():
        found = traffic(layout, "frames", shapes, plan)
        sent, share = sum(sending(found, layout, links)), share_of(layout, shapes)
        allowed = FULL_8S[1] / AIM
        figures = {"allowed": allowed, "sent": sent, "one_gpu": FULL_8S[1] * share / (allowed - sent)}
        figures |= {"gigabytes": found.total.bytes / 1e9, "gigabytes_without": found.without_pab.bytes / 1e9}
        row = {"part": "needs", "layout": name, "aim": AIM, "gpus": layout.ranks, "messages": found.total.messages}
        yield row | {key: round(value, 4) for key, value in figures.items()}


def ladder(links: Links) -> Iterator[Row]:
    """By rung of the modelled ladder, the speed on eight GPUs with nothing to wait for."""
    for title, ratio in LADDER:
        found = latency(assumed_parts(ratio), PUBLISHED, LAYOUTS["cfg 2 x sequence 4, 8-bit return"], links)
        yield {"part": "ladder", "row": title, "one_gpu": ratio, "gpus": 8} | _row(found)


def scaling(links: Links, measured: Parts | None = None) -> Iterator[Row]:
    """From 1 to 64 GPUs, of the published code and of ours; a node has eight."""
    host = measured_host()
    runs = {
        "published code and PAB, bfloat16": (published_parts(links), False),
        "ours (2.17x), eager": (assumed_parts(LADDER[0][1], host), True),
        "ours (2.61x), CUDA graphs": (assumed_parts(LADDER[2][1]), True),
        "ours (3.48x), CUDA graphs": (assumed_parts(LADDER[4][1]), True),
    }
    if measured is not None:
        runs[f"measured: {measured.source}"] = (measured, True)
    for name, (parts, ours) in runs.items():
        for gpus in (1, 2, 4, 8, 16, 32, 64):
            layout = Layout(2, gpus // 2, None, "int8") if ours and gpus > 1 else Layout(1, gpus)
            found = latency(parts, PUBLISHED, layout, links)
            yield {"part": "scaling", "row": name, "gpus": gpus, "cfg": layout.cfg} | _row(found)


def _row(found: Latency, **more: float) -> Row:
    speed = FULL_8S[1] / found.seconds
    row = dataclasses.asdict(found) | {"seconds": found.seconds, "speed": speed, **more}
    return {name: round(value, 4) for name, value in row.items()}


def lines(rows: list[Row], links: Links) -> Iterator[str]:
    """The rows as text."""
    yield f"Open-Sora 1.2, 204 frames at 480p (8 s), {STEPS} steps; eager on one GPU: {FULL_8S[1]} s, published"
    yield f"links: {dataclasses.asdict(links)}"
    columns = f"{'GPUs':>5}{'model':>9}{'published':>11}{'miss':>8}{'without PAB':>13}"
    yield f"\n{'The published latencies of PAB':<40}{columns}"
    for r in (r for r in rows if r["part"] == "check"):
        figures = f"{r['seconds']:>8.2f}s{r['published']:>10.2f}s{r['miss']:>+8.1%}{r['without_pab']:>12.2f}s"
        yield f"{r['reading']:<40}{r['gpus']:>5}{figures}"
    yield f"\n{f'{AIM}x on eight GPUs needs':<40}{'GB sent':>9}{'without PAB':>13}{'sending':>10}{'on one GPU':>12}"
    for r in (r for r in rows if r["part"] == "needs"):
        figures = f"{r['gigabytes']:>9.1f}{r['gigabytes_without']:>13.1f}{r['sent']:>9.2f}s{r['one_gpu']:>11.2f}x"
        yield f"{r['layout']:<40}{figures}"
    yield f"\n{'The ladder, modelled':<60}{'one GPU':>8}{'eight':>8}"
    for r in (r for r in rows if r["part"] == "ladder"):
        yield f"{r['row']:<60}{r['one_gpu']:>7.2f}x{r['speed']:>7.1f}x"
    yield f"\n{'More GPUs':<36}{'GPUs':>5}{'seconds':>9}{'computing':>11}{'sent':>7}{'waits':>7}{'speed':>8}"
    for r in (r for r in rows if r["part"] == "scaling"):
        figures = f"{r['seconds']:>9.2f}{r['computing']:>11.2f}{r['sent']:>7.2f}{r['waits']:>7.2f}{r['speed']:>7.1f}x"
        yield f"{r['row']:<36}{r['gpus']:>5}{figures}"


def draw(rows: list[Row], path: Path) -> None:
    """The speed over the number of GPUs, saved to a file."""
    from pab_kernels.figures import new_figure, saved

    figure = new_figure("the plot", (7.5, 4.2), 120)
    axes = figure.subplots()
    names = dict.fromkeys(row["row"] for row in rows if row["part"] == "scaling")
    for name in names:
        of = [row for row in rows if row["part"] == "scaling" and row["row"] == name]
        axes.plot([row["gpus"] for row in of], [row["speed"] for row in of], marker="o", label=name)
    axes.axhline(AIM, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}x")
    axes.set_xlabel("GPUs, eight to a node")
    axes.set_ylabel("over the eager baseline on one")
    axes.set_title("On paper: Open-Sora 1.2, 480p, 8 s", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    saved(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; write the rows with `--out`."""
    given = Links()
    parser = argparse.ArgumentParser(
        "python -m bench.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=Path, help="measured parts of this package, a JSON file")
    parser.add_argument("--bandwidth", type=float, default=given.bandwidth / 1e9, help="GB/s of a rank in its node")
    parser.add_argument("--network", type=float, default=given.network / 1e9, help="GB/s of a rank to other nodes")
    parser.add_argument("--call", type=float, default=given.call * 1e6, help="microseconds of a collective")
    parser.add_argument("--out", type=Path, help="a file for the rows, JSON lines")
    parser.add_argument("--plot", type=Path, help="a picture of the speed by the number of GPUs")
    args = parser.parse_args(arguments)
    links = Links(args.bandwidth * 1e9, args.network * 1e9, args.call / 1e6)
    measured = Parts.read(args.parts) if args.parts else None
    rows = [*check(links), *needs(links), *ladder(links), *scaling(links, measured)]
    print(*lines(rows, links), sep="\n")
    if args.plot:
        draw(rows, args.plot)
    if args.out:
        shared = {"bench": "parallel", "links": dataclasses.asdict(links)}
        write(args.out, [shared | row for row in rows], "cpu")


if __name__ == "__main__":
    main()
