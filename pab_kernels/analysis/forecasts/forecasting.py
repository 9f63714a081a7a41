"""Forecast of PAB on a model at a clip size, before its weights are loaded: `pab plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...adapters import adapter_for
from ...broadcast.slots import CACHE_DTYPES
from ...messages import first_line, shown
from ...rules.config import CacheDevice, PABConfig
from ...rules.costs import Forecast
from ...rules.forecast import flops_at
from ...rules.plan import Counts, Plan
from ...rules.presets import FEWEST_STEPS, default_preset
from ...rules.schedule import Schedule, check_steps
from ...rules.traffic import Layout
from ...rules.within_budget import within
from ..pipelines import DTYPES
from .measure import Measured, measure
from .model_calls import MODEL_CALLS, Size
from .ranks import RanksForecast, on_ranks, one_of, shapes_of
from .transformers import build, find_config

BUDGET = "budget"
"""Name of the forecast within a budget, among those by cache dtype."""
LARGEST_FORECAST = 1_000_000
"""The most frames, rows, columns, clips and tokens: the sizes of larger tensors overflow."""


@dataclass(frozen=True)
class KindForecast:
    """One kind of sublayer, over a whole generation and all its contexts.

    Args:
        counts: how often its sublayers are computed, stored and reused.
        flops: of its sublayers with the plan.
        flops_without: with every sublayer computed at every step.
        cache_bytes: peak size of its slots, by cache dtype; "model" is the model's dtype, and "budget" the dtypes with
            which the plan keeps its budget.
    """

    counts: Counts
    flops: int
    flops_without: int
    cache_bytes: Mapping[str, int]


@dataclass(frozen=True)
class ModelForecast:
    """PAB on a model at a clip size.

    Args:
        model: its name.
        clip: frames, height and width.
        dtype: of the model.
        batch: clips in a batch.
        calls: calls of the model in a step.
        plan: of the generation.
        kinds: by kind.
        rest_flops: FLOPs outside of the plan's sublayers, over the generation.
        total: with slots in the config's cache dtype, or in those of its budget.
        peak_cache_bytes: peak size on the device of all slots, and of what sublayers keep for a generation, by cache
            dtype, without the budget and, as "budget", within it.
        weight_bytes: of parameters and buffers.
        activation_bytes: peak size of one call's other tensors; see `measure`.
        ranks: one of several ranks, if a layout was given.
        peak_host_bytes: peak size of the slots in host memory, as `peak_cache_bytes`.
    """

    model: str
    clip: Size
    dtype: str
    batch: int
    calls: int
    plan: Plan
    kinds: Mapping[str, KindForecast]
    rest_flops: int
    total: Forecast
    peak_cache_bytes: Mapping[str, int]
    weight_bytes: int
    activation_bytes: int
    ranks: RanksForecast | None = None
    peak_host_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """Device memory: weights, peak activations of a call and peak slots.

        It does not include the text encoder, the VAE, the scheduler's latents, and the memory of the CUDA context, the
        allocator and kernels.
        """
        return self.weight_bytes + self.activation_bytes + self.total.peak_cache_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        kinds = {
            kind: asdict(found.counts)
            | {"flops": found.flops, "flops_without": found.flops_without, "cache_bytes": dict(found.cache_bytes)}
            for kind, found in self.kinds.items()
        }
        return {
            "model": self.model,
            "size": list(self.clip),
            "dtype": self.dtype,
            "batch": self.batch,
            "calls_per_step": self.calls,
            "steps": self.plan.schedule.num_steps,
            "timesteps": list(self.plan.schedule.timesteps or ()),
            "config": self.plan.config.to_dict(),
            "schedule": {label: "".join(d.action.value for d in row) for label, row in self.plan.grouped()},
            "notes": list(self.plan.notes),
            "kinds": kinds,
            "rest_flops": self.rest_flops,
            "flops": self.total.flops,
            "flops_without": self.total.flops_without,
            "flops_by_step": list(self.total.flops_by_step),
            "cache_bytes_by_step": list(self.total.cache_bytes),
            "cache_bytes_by_kind": {kind: list(held) for kind, held in self.total.cache_bytes_by_kind.items()},
            "peak_cache_bytes": dict(self.peak_cache_bytes),
            "host_bytes_by_step": list(self.total.host_bytes),
            "host_bytes_by_kind": {kind: list(held) for kind, held in self.total.host_bytes_by_kind.items()},
            "peak_host_bytes": dict(self.peak_host_bytes),
            "fetched_bytes_by_step": list(self.total.fetched_bytes),
            "sent_bytes_by_step": list(self.total.sent_bytes),
            "given_up": self.plan.given_up and asdict(self.plan.given_up),
            "moved_bytes": self.total.moved_bytes,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "device_bytes": self.device_bytes,
            "ranks": self.ranks and self.ranks.to_dict(),
        }


def forecast(
    model: str | Path | Mapping[str, Any],
    size: Size | tuple[int, int, int] | None = None,
    *,
    steps: int | None = None,
    config: PABConfig | None = None,
    dtype: str = "bfloat16",
    batch: int = 1,
    text: int | None = None,
    layout: Layout | None = None,
    budget: int | str | None = None,
    cache_device: CacheDevice | None = None,
) -> ModelForecast:
    """FLOPs, cache bytes, bytes moved and device memory of a generation with PAB, from shapes alone.

    1. The transformer is created from its config on the meta device, where tensors have shapes but no values, and is
       called once.
    2. Its plan is made for the timesteps of its family's usual scheduler.
    3. The plan's forecast from that call equals the counts of a generation on the device: `ops.flop_counter()` and
       `pab.summary(...).peak_cache_bytes`.

    Args:
        model: a name in `families.FAMILIES`, a hub id, the path of a config.json or of a folder with one, or a config
            with `_class_name`.
        size: frames, height and width of the clip; default the usual one of a known family.
        steps: of the sampling; default the usual number of a known family.
        config: the rules; default the preset "balanced".
        dtype: of the model: "bfloat16", "float16" or "float32".
        batch: clips in a batch, not counting classifier-free guidance.
        text: tokens of the prompt, including padding; default the number of the family's pipeline.
        layout: of several ranks that share the model, for what one of them sends and keeps.
        budget: the most bytes that a generation keeps on the device, on each rank, in place of that of the config.
        cache_device: where outputs are kept, in place of what the config says.

    Returns:
        The plan and its costs.

    Raises:
        ValueError: the model is unknown, the size or another value is not supported, the ranks do not divide the
            model, or no plan fits the budget.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: diffusers is not installed, or huggingface_hub for a hub id.

    >>> found = forecast("open-sora-1.2", (51, 480, 854), config=PABConfig.preset("open-sora-1.2"))
    >>> round(sum(found.kinds[kind].cache_bytes["model"] for kind in ("spatial", "temporal", "cross")) / 2**30, 1)
    11.5
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    for name, value in (("batch", batch), ("text", text), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("batch", batch), ("text", text), *zip(Size._fields, size or (), strict=False)):
        if value is not None and value > LARGEST_FORECAST:
            raise ValueError(f"{name} must be at most {LARGEST_FORECAST:,}, got {shown(value)}")
    check_steps(steps or 1)
    source = find_config(model)
    clip = Size(*(size or source.size or _missing(source.name, "size")))
    if min(clip) < 1:
        raise ValueError(f"frames, height and width must be at least 1, got size {clip}")
    steps = steps or source.steps or _missing(source.name, "steps")
    how = MODEL_CALLS[source.class_name]
    transformer = build(source, DTYPES[dtype])
    latents = how.latents(transformer.config, clip)
    if config is None:  # below that number, `enable` leaves the model alone
        config = default_preset(follows_scheduler=True) if steps >= FEWEST_STEPS else PABConfig()
    config = config if budget is None else replace(config, budget=budget)
    config = config if cache_device is None else replace(config, cache_device=cache_device)
    sublayers = tuple(adapter_for(transformer).sublayers)
    if config.fitted is not None:
        config.fitted.check_names(sublayers, type(transformer).__name__)
    plan = Plan(config, Schedule.of(timesteps=how.timesteps(steps, latents, clip)), sublayers)
    try:
        inputs = how.tensors(transformer.config, how.batch * batch, latents, text or how.text, DTYPES[dtype])
        measured = measure(transformer, inputs, plan.sublayers)
    except (RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{source.name} does not run on a clip of {clip}: {first_line(error)}") from error
    latents_bytes = next(iter(inputs.values())).nbytes // how.batch
    shapes = None if layout is None else shapes_of(how, plan, measured, transformer, batch, text or how.text)
    kept_by = measured if layout is None or shapes is None else one_of(layout, how, measured, shapes)
    unlimited, by_dtype = plan, {kept: kept_by.costs(kept)[0] for kept in CACHE_DTYPES}
    if config.budget is not None:
        limit, follows = _bytes(config.budget), measured.follows
        plan = within(plan, by_dtype, limit, how.contexts, latents_bytes, follows=follows)

    def forecasts(measured: Measured) -> dict[str, Forecast]:
        """By cache dtype, without the budget, and then within it."""
        found = {
            str(kept or "model"): unlimited.forecast(*measured.costs(kept), how.contexts, latents_bytes)
            for kept in CACHE_DTYPES
        }
        if config.budget is not None:
            costs = plan.costs({kept: measured.costs(kept)[0] for kept in CACHE_DTYPES})
            found[BUDGET] = plan.forecast(costs, measured.costs()[1], how.contexts, latents_bytes)
        return found

    found, ranks = forecasts(measured), None
    if layout is not None and shapes is not None:
        peaks = {kept: forecast.peak_cache_bytes for kept, forecast in forecasts(kept_by).items()}
        ranks = on_ranks(layout, how, plan, shapes, peaks)
    costs, rest = measured.costs()
    calls = how.contexts * len(plan.steps)
    run = {kind: [s.name for s in plan.sublayers if s.kind == kind] for kind in plan.kinds()}
    counts = {kind: Counts(*(how.contexts * n for n in vars(c).values())) for kind, c in plan.counts().items()}
    kinds = {
        kind: KindForecast(
            counts[kind],
            how.contexts * sum(flops_at(plan, costs, name, step) for name in names for step in plan.runs[name]),
            calls * sum(costs[name].flops for name in names),
            {kept: forecast.peak_by_kind[kind] for kept, forecast in found.items()},
        )
        for kind, names in run.items()
    }
    return ModelForecast(
        source.name,
        clip,
        dtype,
        batch,
        how.contexts,
        plan,
        kinds,
        calls * rest,
        found[str(config.cache_dtype or "model") if config.budget is None else BUDGET],
        {kept: forecast.peak_cache_bytes for kept, forecast in found.items()},
        measured.weight_bytes,
        measured.activation_bytes,
        ranks,
        {kept: forecast.peak_host_bytes for kept, forecast in found.items()},
    )


def _bytes(budget: Any) -> int:
    if isinstance(budget, int):
        return budget
    raise ValueError(
        f"got {budget:.0%} of the free memory as budget, and a forecast has no device; give a number of bytes, such as "
        "'8GiB'"
    )


def _missing(model: str, what: str) -> Any:
    raise ValueError(f"{model} is not a known family, so {what} must be given")
