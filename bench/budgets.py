"""What fits on which device: the paper's rules on the known models, within the memory that a device leaves them.

    python -m bench.budgets --out bench/results/budgets.jsonl
    python -m bench.budgets --models wan2.1-14b,flux.1-dev --gigabytes 32

Weights and one call's activations come first, with 2 GB for the CUDA context, the allocator and kernels; kept outputs
may have the rest. Text encoder and VAE are elsewhere then. Where not all fits, a second row has `cache_device="cpu"`:
what is kept on the host, and how long a step without PAB has to take so that no step waits for the bus. Everything is a
forecast from shapes (`pab plan`), in bfloat16: no weight is loaded and no device is used.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pab_kernels import PABConfig
from pab_kernels.analysis import forecast
from pab_kernels.analysis.forecasts.families import FAMILIES
from pab_kernels.analysis.forecasts.forecasting import ModelForecast
from pab_kernels.rules.budget import BudgetTooSmall, in_units
from pab_kernels.rules.plan import Plan

from .record import append, environment, read
from .table import Table

Row = dict[str, Any]

GIGABYTES = (24, 48, 80, 141)
RESERVED = 2 * 10**9
BANDWIDTH = 25e9
"""Of the bus to host memory, in bytes a second each way."""


def kinds(plan: Plan, names: tuple[str, ...]) -> dict[str, int]:
    """How many sublayers of each kind are among `names`."""
    return dict(Counter(s.kind for s in plan.sublayers if s.name in names))


def rows(model: str, size: tuple[int, int, int], gigabytes: tuple[int, ...]) -> Iterator[Row]:
    """A row for each device."""
    config = PABConfig.preset("pab246")
    whole = forecast(model, size, config=config)
    yield row(whole, None, None)
    for capacity in gigabytes:
        left = capacity * 10**9 - RESERVED - whole.weight_bytes - whole.activation_bytes
        for place in (None, "cpu"):
            found = None
            if left > 0:
                with contextlib.suppress(BudgetTooSmall):
                    found = forecast(model, size, config=config, budget=left, cache_device=place)
            yield row(whole, capacity, found, place)
            if left <= 0 or (found is not None and not gives_up(found)):
                break


def gives_up(found: ModelForecast) -> bool:
    """Whether a forecast is not that of all outputs kept as they are."""
    given_up = found.plan.given_up
    return given_up is not None and bool(given_up.fewer_bits or given_up.computed or given_up.on_host)


def row(whole: ModelForecast, capacity: int | None, found: ModelForecast | None, place: str | None = None) -> Row:
    """One forecast; without `capacity` that of no limit, and without `found` that nothing fits."""
    chosen = whole if capacity is None else found
    common = {
        "bench": "budgets",
        "model": whole.model,
        "size": list(whole.clip),
        "steps": whole.plan.schedule.num_steps,
        "gigabytes": capacity,
        "cache_device": place,
        "weight_bytes": whole.weight_bytes,
        "activation_bytes": whole.activation_bytes,
    }
    if chosen is None:
        return common | {"share": None}
    plan, given_up = chosen.plan, chosen.plan.given_up
    return common | {
        "share": round(chosen.total.share, 4),
        "peak_cache_bytes": chosen.total.peak_cache_bytes,
        "peak_host_bytes": chosen.total.peak_host_bytes,
        "least_step_seconds": round(chosen.total.least_step_seconds(BANDWIDTH), 2),
        "fewer_bits": kinds(plan, given_up.fewer_bits) if given_up else {},
        "computed": kinds(plan, given_up.computed) if given_up else {},
    }


def report(found: list[Row]) -> None:
    """Print a line for each model and size, and a column for each device."""
    capacities = sorted({r["gigabytes"] for r in found if r["gigabytes"] is not None})
    by_case: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for r in found:
        by_case.setdefault((r["model"], *r["size"]), {})[r["gigabytes"], r.get("cache_device")] = r
    lines = []
    for (model, *size), of in by_case.items():
        whole = of[None, None]
        line = [model, "x".join(map(str, size)), in_units(whole["weight_bytes"] + whole["activation_bytes"])]
        line.append(f"{whole['share']:.0%}, {in_units(whole['peak_cache_bytes'])}")
        lines.append([*line, *(in_words(of[n, None]) if (n, None) in of else "" for n in capacities)])
        moved = [in_words(of[n, "cpu"]) if (n, "cpu") in of else "" for n in capacities]
        if any(moved):
            lines.append(["", "", "", "with host memory", *moved])
    headings = ["model", "clip", "weights, activations", "no limit", *(f"{n} GB" for n in capacities)]
    print(Table("PAB 2/4/6 in bfloat16, forecast", headings, lines, []).markdown())


def in_words(r: Row) -> str:
    """The share of the FLOPs, and what is given up for it."""
    if r["share"] is None:
        return "nothing fits"
    given = [
        "".join(f", {n} {kind} {what}" for kind, n in r[name].items())
        for name, what in (("fewer_bits", "int8"), ("computed", "computed"))
    ]
    if r.get("peak_host_bytes"):
        given.append(f", {in_units(r['peak_host_bytes'])}, {r['least_step_seconds']} s")
    return f"{r['share']:.0%}{''.join(given) or ', all kept'}"


def main() -> None:
    """Forecast, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(FAMILIES), help="names of `pab plan --list`")
    parser.add_argument("--gigabytes", default=",".join(map(str, GIGABYTES)), help="memory of devices, in 10^9 bytes")
    parser.add_argument("--read", help="print the table of a file instead")
    parser.add_argument("--out", help="a file for the rows, as JSON lines")
    args = parser.parse_args()
    if args.read:
        report(read([args.read]))
        return
    gigabytes, shared, found = tuple(map(int, args.gigabytes.split(","))), environment("cpu"), []
    for model in args.models.split(","):
        for size in FAMILIES[model].sizes:
            for r in rows(model, size, gigabytes):
                found.append(r)
                if args.out:
                    append(args.out, r, shared)
    report(found)


if __name__ == "__main__":
    main()
