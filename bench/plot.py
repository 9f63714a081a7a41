"""Plots of what was measured, from files of JSON lines.

    python -m bench.plot bench/results/*.jsonl --out docs/images

One picture for every operation, device and dtype: for each case the time of every candidate over the floor, so that 1
is what the memory or the matrix units allow. Bars have the spread of the repeats; a candidate that was wrong or could
not serve has none.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from pab_kernels import extras

from .record import read

Row = dict[str, Any]


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the pictures, SVG, and say where they are."""
    extras.require("matplotlib", "a plot of benchmarks")
    groups: dict[tuple[str, str, str], dict[tuple[str, str, str], Row]] = {}
    for row in rows:
        if row.get("status") == "ok" and "candidate" in row:
            group = groups.setdefault((row["bench"], row["device"], row["dtype"]), {})
            group[row["geometry"], row["case"], row["candidate"]] = row
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(key, list(group.values()), folder) for key, group in groups.items()]


def _draw(key: tuple[str, str, str], rows: list[Row], folder: Path) -> Path:
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row["geometry"], row["case"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in sorted(rows, key=lambda row: not row["ours"])))
    height = 0.8 / len(names)
    figure = Figure(figsize=(9, 1.2 + len(cases) * (0.25 + 0.13 * len(names))), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        mine = [row for row in rows if row["candidate"] == name]
        places = [cases.index((row["geometry"], row["case"])) + (i + 0.5) * height - 0.4 for row in mine]
        times = [row["microseconds"] / row["floor_microseconds"] for row in mine]
        spread = [
            [(row["microseconds"] - row["spread"][0]) / row["floor_microseconds"] for row in mine],
            [(row["spread"][1] - row["microseconds"]) / row["floor_microseconds"] for row in mine],
        ]
        hatch = "//" if mine[0]["ours"] else None
        axes.barh(
            places,
            times,
            height,
            xerr=spread,
            label=name,
            hatch=hatch,
            color=f"C{i % 10}",
            error_kw={"elinewidth": 0.6},
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time over the floor: 1 is what the device's copy bandwidth and matrix rate allow; less is better")
    axes.set_yticks(range(len(cases)), [f"{geometry}\n{case}" for geometry, case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(", ".join(key), loc="left", fontsize=9)
    axes.legend(fontsize=7)
    path = folder / f"bench-{_slug('-'.join(key))}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main() -> None:
    """Draw the files named."""
    parser = argparse.ArgumentParser(
        "python -m bench.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder")
    args = parser.parse_args()
    for path in plot(read(args.files), args.out):
        print(path)


if __name__ == "__main__":
    main()
