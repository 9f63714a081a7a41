"""Tables of what was measured, from files of JSON lines, in markdown as the README has them.

    python -m bench.table bench/results/attention-*.jsonl

A line for every case, whoever wins it: the time of the best backend of this package, of torch eager and compiled, of
the best kernel of SDPA, and so on, which one in brackets; the fastest is bold. Where a candidate was measured more than
once, the last row counts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from .record import read

Row = dict[str, Any]

COLUMNS = ("ours", "torch eager", "torch.compile", "SDPA", "flash-attn", "FlexAttention", "others")
"""Candidates are put together by how their names begin."""


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, lines of cells, and notes below."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """As markdown."""
        grid = [self.header, ["---"] * len(self.header), *self.lines]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in grid)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"**{self.title}**\n\n{table}\n{notes}".rstrip() + "\n"


def tables(rows: list[Row]) -> list[Table]:
    """A table for every operation, device and dtype."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        if "candidate" in row:
            group = groups.setdefault((row["bench"], row.get("device", ""), row["dtype"]), {})
            group.setdefault((row["geometry"], row["case"]), {})[row["candidate"]] = row
    return [_table(", ".join(part for part in key if part), cases) for key, cases in groups.items()]


def best(rows: list[Row], ours: bool) -> Row | None:
    """The fastest of our rows or of the others."""
    timed = [row for row in rows if row["status"] == "ok" and row["ours"] == ours]
    return min(timed, key=lambda row: row["microseconds"], default=None)


def _table(title: str, cases: dict[tuple[str, str], dict[str, Row]]) -> Table:
    columns = [
        name for name in COLUMNS if any(_column(row) == name for rows in cases.values() for row in rows.values())
    ]
    header = [
        "geometry",
        "case",
        "floor, us",
        *(f"{name}, us" for name in columns),
        "ours, of the floor",
        "best other / ours",
    ]
    lines = [[*case, *_cells(list(rows.values()), columns)] for case, rows in cases.items()]
    return Table(title, header, lines, _notes(cases))


def _column(row: Row) -> str:
    return (
        "ours"
        if row["ours"]
        else next((name for name in COLUMNS[1:] if row["candidate"].startswith(name)), COLUMNS[-1])
    )


def _cells(rows: list[Row], columns: list[str]) -> list[str]:
    timed = [row["microseconds"] for row in rows if row["status"] == "ok"]
    floor = next((_number(row["floor_microseconds"]) for row in rows if "floor_microseconds" in row), "")
    cells = [_cell([row for row in rows if _column(row) == name], min(timed, default=0.0)) for name in columns]
    ours, other = best(rows, True), best(rows, False)
    share = f"{100 * ours['share_of_floor']:.0f} %" if ours else ""
    return [floor, *cells, share, f"{other['microseconds'] / ours['microseconds']:.2f}x" if ours and other else ""]


def _cell(rows: list[Row], fastest: float) -> str:
    """The fastest of a column's candidates, and which it is where the column has several.

    What is wrong or failed as well.
    """
    timed = [row for row in rows if row["status"] == "ok"]
    bad = [
        f"{row['status']}: {_short(row) or row['candidate']}" for row in rows if row["status"] in ("wrong", "failed")
    ]
    if not timed:
        return ", ".join(bad) or ("-" if rows else "")
    row = min(timed, key=lambda row: row["microseconds"])
    text = _number(row["microseconds"]) + (f" ({_short(row)})" if len(rows) > 1 and _short(row) else "")
    return ", ".join([f"**{text}**" if row["microseconds"] == fastest else text, *bad])


def _short(row: Row) -> str:
    return row["candidate"].removeprefix("pab ").removeprefix(_column(row)).strip()


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _notes(cases: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    """Why rows have no time, each reason once with the cases that have it; the widest spread; and the ceilings."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    rows = [row for by_name in cases.values() for row in by_name.values()]
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["candidate"], row["status"], row["reason"]), []).append(
                f"{row['geometry']} {row['case']}"
            )
    notes = []
    for (candidate, status, reason), where in reasons.items():
        places = "everywhere" if len(where) == len(cases) else ", ".join(where)
        notes.append(f"{candidate}, {status} ({places}): {reason}")
    timed = [row for row in rows if row["status"] == "ok"]
    if timed:
        spread = max((row["spread"][1] - row["spread"][0]) / row["microseconds"] for row in timed)
        copies, products = (
            [row[f"{name}_per_second"] for row in timed] for name in ("copy_gigabytes", "matmul_teraflops")
        )
        notes.append(f"medians; the spread from the fastest to the slowest repeat is at most {100 * spread:.1f} %")
        notes.append(
            f"the floor is that of a copy at {_range(copies)} GB/s and a matrix product at {_range(products)} TFLOP/s, "
            "same runs"
        )
        if any(not row["exceeds_cache"] for row in timed):
            notes.append("some inputs were not larger than three times the L2 cache: no measure of a GPU")
    return notes


def _range(values: list[float]) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"


def listing(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a list of all rows, for a terminal."""
    header = ["operation", "geometry", "case", "candidate", "us", "from", "to", "of the floor", "GB/s", "TFLOP/s"]
    lines = []
    for row in rows:
        if row["status"] == "ok":
            rates = [_number(row["gigabytes_per_second"]), _number(row["teraflops_per_second"]) if row["flops"] else ""]
            times = [_number(value) for value in (row["microseconds"], *row["spread"])]
            figures = [*times, f"{100 * row['share_of_floor']:.0f} %", *rates]
        else:
            figures = [row["status"], "", "", "", "", ""]
        lines.append([row["bench"], row["geometry"], row["case"], row["candidate"], *figures])
    return header, lines


def show(rows: list[Row]) -> None:
    """Print all rows, with rich where it is installed and there is a terminal to show it on, and the notes of their
    tables."""
    header, lines = listing(rows)
    if sys.stdout.isatty() and find_spec("rich"):
        _show_with_rich(header, lines)
    else:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        for line in [header, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for table in tables(rows):
        print(f"{table.title}:", *table.notes, sep="\n- ")


def _show_with_rich(header: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    grid = RichTable()
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i < 4 else "right")
    for line in lines:
        grid.add_row(*line)
    Console().print(grid)


def main() -> None:
    """Print the tables of the files named."""
    parser = argparse.ArgumentParser(
        "python -m bench.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    for table in tables(read(parser.parse_args().files)):
        print(table.markdown())


if __name__ == "__main__":
    main()
