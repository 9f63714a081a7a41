"""`pab plan`: its options and its tables."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..extras import require
from ..figures import check_plot_path
from ..rules.config import PABConfig
from ..rules.formats import named_config
from ..rules.plan import plan
from ..rules.schedule import check_steps
from ..rules.traffic import Layout, returned
from ..strict_json import to_json
from .arguments import AsJson, Budget, CacheDevice, numbers
from .display import output, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..analysis.forecasts.forecasting import ModelForecast
    from ..analysis.forecasts.ranks import RanksForecast
    from ..rules.costs import Forecast

BANDWIDTH = 25.0
"""Of the bus to host memory, in GB a second each way: assumed, for PCIe 4.0 with 16 lanes, whose limit is 31.5."""
WIDE = 126
"""Columns of the table if it is not printed to a terminal."""


def _gigaflops(flops: int) -> str:
    return f"{flops / 1e9:,.1f}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def forecast_table(found: "ModelForecast") -> "Table":
    """A row for each kind, one for the rest of the model, and the total."""
    bytes_of = list(found.peak_cache_bytes)
    rows = []
    for kind, one in found.kinds.items():
        counts = [f"{n:,}" for n in (one.counts.computed, one.counts.stored, one.counts.reused)]
        flops = [_gigaflops(one.flops), _gigaflops(one.flops_without)]
        rows.append([kind, *counts, *flops, *(_gib(one.cache_bytes[d]) for d in bytes_of)])
    rows.append(["rest", "", "", "", *2 * [_gigaflops(found.rest_flops)], *("" for _ in bytes_of)])
    flops = [_gigaflops(found.total.flops), _gigaflops(found.total.flops_without)]
    on_host = any(found.peak_host_bytes.values())
    title = "device" if on_host else "total"
    rows.append([title, "", "", "", *flops, *map(_gib, found.peak_cache_bytes.values())])
    if on_host:
        rows.append(["host", "", "", "", "", "", *map(_gib, found.peak_host_bytes.values())])
    names = {"model": found.dtype, "float8_e4m3fn": "fp8", "budget": "in the budget"}
    caches = [names.get(d, d) for d in bytes_of]
    headings = ("kind", "computed", "stored", "reused", "GFLOPs", "without PAB", *caches)
    caption = (
        f"Over {len(found.plan.steps)} step(s) with {found.calls} call(s) each; computed includes stored. The cache, "
        "by dtype in GiB: the peak of each kind's slots; the total is the peak of all slots together, and of the "
        "text's keys and values where they are kept" + ("; on the device also what is on its way." if on_host else ".")
    )
    return table(headings, rows, caption=caption)


def _lines(found: "ModelForecast") -> list[str]:
    total = found.total
    cache = "in the budget" if found.plan.given_up else found.plan.config.cache_dtype or found.dtype
    return [
        f"FLOPs          {total.flops:.4e} of {total.flops_without:.4e} ({total.share:.1%})",
        f"bytes moved    {_gib(total.moved_bytes)} GiB by reuses",
        f"device memory  {_gib(found.device_bytes)} GiB: weights {_gib(found.weight_bytes)}, activations "
        f"{_gib(found.activation_bytes)}, cache {_gib(total.peak_cache_bytes)} ({cache}); without text encoder and VAE",
    ]


def _bus(total: "Forecast", bandwidth: float | None) -> dict[str, Any]:
    """How long a step without PAB has to take so that no step waits for copies, if any are made."""
    if not total.peak_host_bytes:
        return {}
    bandwidth = BANDWIDTH if bandwidth is None else bandwidth
    return {"bandwidth": bandwidth * 1e9, "least_step_seconds": total.least_step_seconds(bandwidth * 1e9)}


def _bus_lines(total: "Forecast", bandwidth: float | None) -> list[str]:
    if not total.peak_host_bytes:
        return []
    found = _bus(total, bandwidth)
    return [
        f"host memory    {_gib(total.peak_host_bytes)} GiB; a step copies up to {_gib(max(total.fetched_bytes))} GiB "
        f"from it and {_gib(max(total.sent_bytes))} GiB to it",
        f"bus            no step waits where one without PAB takes {found['least_step_seconds']:.2f} s or more, at "
        f"{found['bandwidth'] / 1e9:g} GB a second each way",
    ]


def traffic_table(found: "RanksForecast") -> "Table":
    """A row for each kind that sends, one for the model's output, and the total."""
    traffic = found.traffic
    names = [*traffic.sent, "total"]
    sent, full = [*traffic.by_kind.values(), traffic.total], [*traffic.full.values(), traffic.without_pab]
    rows = []
    for name, one, without in zip(names, sent, full, strict=True):
        share = f"{one.bytes / without.bytes:.1%}" if without.bytes else ""
        sizes = [f"{s.bytes / 1e9:,.3f}" for s in (one, without)]
        rows.append([name, *sizes, share, f"{one.messages:,}", f"{without.messages:,}"])
    headings = ("kind", "sent, GB", "without PAB", "share", "messages", "without PAB")
    wires = (("inputs", found.layout.input_dtype), ("outputs of attention", found.layout.return_dtype))
    eight = "".join(f"; {what} travel in {dtype}" for what, dtype in wires if dtype is not None)
    caption = f"{found}. What each sends to others over the generation, padding included{eight}."
    return table(headings, rows, caption=caption)


def _rank_lines(found: "RanksForecast", kept: str) -> list[str]:
    megabytes = [f"{sent.bytes / 1e6:,.1f}" for sent in found.traffic.by_step]
    runs = [(size, len(list(steps))) for size, steps in itertools.groupby(megabytes)]
    by_step = ", ".join(f"{size} x {n}" if n > 1 else size for size, n in runs)
    return [f"sent by step   {by_step} MB", f"cache a rank   {_gib(found.peak_cache_bytes[kept])} GiB"]


def _print_families(as_json: bool) -> None:
    from ..analysis.forecasts.families import FAMILIES

    if as_json:
        listed = {
            name: {
                "checkpoint": f.checkpoint,
                "class": f.config["_class_name"],
                "sizes": [list(s) for s in f.sizes],
                "steps": f.steps,
            }
            for name, f in FAMILIES.items()
        }
        print(to_json(listed))
        return
    rows = [[name, f.checkpoint, ", ".join(map(str, f.sizes)), str(f.steps)] for name, f in FAMILIES.items()]
    require("rich", "pab plan")
    output(WIDE).print(table(("model", "checkpoint", "sizes", "steps"), rows, words=3))


def command(
    model: Annotated[
        str | None,
        typer.Option(
            help="A known model (see --list), a hub id, or the path of a transformer's config.json or folder."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="FxHxW", help="Frames, height and width of the clip. Default: the model's usual size."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: the model's usual number.")] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="PRESET|FILE", help="A preset, or a .yaml or .json file. Default: balanced."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Clips in a batch.")] = 1,
    text: Annotated[
        int | None, typer.Option(help="Tokens of the prompt, including padding. Default: the model's pipeline's.")
    ] = None,
    budget: Budget = None,
    cache_device: CacheDevice = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Of the bus to host memory each way, in GB a second; with --cache-device. Default: 25."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(metavar="N", help="Count what each of N ranks that share the model sends and keeps.")
    ] = None,
    cfg: Annotated[
        int | None, typer.Option(help="Of these, ranks that share the branches of guidance: 1 or 2. Default: 1.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the schedule: .png, .pdf or .svg.")] = None,
    list_models: Annotated[
        bool, typer.Option("--list", help="List the known models and their published sizes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw the schedule, and forecast FLOPs, cache, bytes moved and device memory, without loading weights.

    The model is created on the meta device, where tensors have shapes but no values. Bytes moved are those that reuses
    read and write. Device memory is the weights, the peak activations of one call in eager torch, and the peak cache.
    With --ranks, also the bytes and messages that each rank sends.
    """
    if list_models:
        _print_families(as_json)
        return
    for name, value in (("--steps", steps), ("--batch", batch), ("--text", text)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_steps(steps or 1, "--steps")
    if cfg is not None and ranks is None:
        raise ValueError("--cfg tells how many of the ranks share the branches of guidance; give --ranks too")
    if bandwidth is not None and not (cache_device and 0 < bandwidth < math.inf):
        raise ValueError(f"--bandwidth is a number above 0 and goes with --cache-device cpu, got {bandwidth}")
    if plot is not None:
        check_plot_path(plot)
    if model is None:
        for option, given in (
            ("--size is the size of a model's clip", size),
            ("--ranks share a model", ranks),
            ("--budget is for the outputs of a model", budget),
            ("--cache-device is for the outputs of a model", cache_device),
        ):
            if given is not None:
                raise ValueError(f"{option}; give --model too")
        if config is None or steps is None:
            raise ValueError(
                "pab plan needs --model, or --config and --steps to draw a schedule alone; --list shows the models"
            )
        made, cost = plan(named_config(config), num_steps=steps), None
        masks = {label: "".join(d.action.value for d in row) for label, row in made.grouped()}
        data = {"steps": made.schedule.num_steps, "config": made.config.to_dict(), "schedule": masks}
        print(to_json(data | {"notes": list(made.notes)}) if as_json else made)
    else:
        from ..analysis.forecasts.forecasting import forecast

        rules: PABConfig | None = None if config is None else named_config(config)
        layout = None
        if ranks is not None:
            dtype_back = returned(rules.cache_dtype) if rules else None
            layout = Layout.of(ranks, 1 if cfg is None else cfg, return_dtype=dtype_back)
        takes = "--size takes frames x height x width such as 51x480x854, or 1x1024x1024 of an image"
        found = forecast(
            model,
            numbers(size, takes, "x", int, counts=(3,)),
            steps=steps,
            config=rules,
            dtype=dtype,
            batch=batch,
            text=text,
            layout=layout,
            budget=budget,
            cache_device=cache_device,  # type: ignore[arg-type]  # PABConfig checks it
        )
        made, cost = found.plan, found.total
        if as_json:
            print(to_json(found.to_dict() | _bus(cost, bandwidth)))
        else:
            require("rich", "pab plan")
            print(f"{found.model}, {found.clip}, {found.dtype}, {found.batch} clip(s)", made, sep="\n")
            output(WIDE).print(forecast_table(found))
            print(*_lines(found), *_bus_lines(cost, bandwidth), sep="\n")
            if found.ranks is not None:
                output(WIDE).print(traffic_table(found.ranks))
                kept = "budget" if made.given_up else made.config.cache_dtype or "model"
                print(*_rank_lines(found.ranks, kept), sep="\n")
    if plot is not None:
        made.plot(str(plot), cost)
