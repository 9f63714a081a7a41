"""Configs in other formats: YAML and JSON files, diffusers' and VideoSys's settings, masks of steps."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, SupportsIndex

from ..extras import require
from ..files import path_of, read_text, write_text
from ..messages import shortened, shown
from ..strict_json import from_json, to_json
from .config import KINDS, Broadcast, CachePoint, PABConfig
from .plan import Action, Plan, Sublayer
from .presets import presets
from .schedule import MOST_STEPS, check_steps
from .yaml_text import from_yaml

_ENDINGS = (".json", ".yaml", ".yml")
_CALIBRATION = "calibration"
"""A field of a config file with what the config was found by."""
_ATTENTIONS = ("spatial", "temporal", "cross")
_MLP_TABLES = ("mlp_spatial_broadcast_config", "mlp_temporal_broadcast_config")
_VIDEOSYS = (
    *(f"{kind}_{what}" for kind in _ATTENTIONS for what in ("broadcast", "threshold", "range")),
    "mlp_broadcast",
    *_MLP_TABLES,
)


# Files


def _ending(path: Path) -> str:
    if path.suffix.lower() not in _ENDINGS:
        got = shown(path.suffix) if path.suffix else "no ending"
        raise ValueError(f"{shortened(str(path))}: a config file ends in .json, .yaml or .yml, got {got}; rename it")
    return path.suffix.lower()


def save_config(config: PABConfig, path: str | Path, *, calibration: Mapping[str, Any] | None = None) -> Path:
    """Write a config as JSON or YAML, depending on the ending of `path`, for `load_config` to read.

    Args:
        config: the rules.
        path: the file; it is written whole or not at all.
        calibration: what the config was found by, JSON-ready: written as the field `calibration`, which `load_config`
            leaves out.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.
        ValueError: the ending is not .json, .yaml or .yml.
        ModuleNotFoundError: PyYAML is not installed and the file is YAML.
    """
    path = path_of(path)
    data = config.to_dict() | ({} if calibration is None else {_CALIBRATION: dict(calibration)})
    if _ending(path) == ".json":
        return write_text(path, to_json(data) + "\n")
    comment = "" if calibration is None else "# Found by pab.calibrate; `calibration` has what reproduces it.\n"
    return write_text(path, comment + _in_yaml(data))


def _in_yaml(data: Mapping[str, Any]) -> str:
    """YAML with lists of numbers in one line."""
    yaml: Any = require("yaml", "writing YAML files")

    class Dumper(yaml.SafeDumper):  # PyYAML's own stays as it is
        pass

    def represent(dumper: Any, values: list[Any]) -> Any:
        inline = bool(values) and all(isinstance(v, (int, float)) for v in values)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=inline)

    Dumper.add_representer(list, represent)
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False))


def load_config(path: str | Path) -> PABConfig:
    """Read a config from a JSON or YAML file.

    The file holds the fields of `PABConfig`; a rule is a range or the fields of `Broadcast`. Missing fields have their
    defaults. The field `calibration` is left out.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or is far larger than a config; or the ending, the syntax or a value is not
            supported, such as a number that is not finite or a field that occurs twice.
        ModuleNotFoundError: PyYAML is not installed and the file is YAML.
    """
    path = path_of(path)
    parse = from_json if _ending(path) == ".json" else from_yaml
    text = read_text(path)
    try:
        data = parse(text)
        rules = {k: v for k, v in data.items() if k != _CALIBRATION} if isinstance(data, Mapping) else data
        return PABConfig.from_dict(rules)
    except ValueError as error:
        raise ValueError(f"{path}: {shortened(str(error), 1000)}") from None


def named_config(name: str | Path) -> PABConfig:
    """The config of a preset or of a file, as command lines name it.

    Args:
        name: of a preset, or the path of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such preset, or the file does not hold a config.
    """
    name = str(path_of(name))
    if name in presets():
        return presets()[name]
    if Path(name).suffix.lower() in _ENDINGS or os.path.exists(name):
        return load_config(name)
    near = difflib.get_close_matches(name, presets(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    known = ", ".join(sorted(presets()))
    raise ValueError(f"there is no preset {shown(name)}{hint} there are {known}; a file ends in .json, .yaml or .yml")


# diffusers


def from_diffusers(config: Any, sublayers: Sequence[Sublayer] | None = None) -> PABConfig:
    """The rules of diffusers' `PyramidAttentionBroadcastConfig`.

    1. `<kind>_attention_block_skip_range` is the kind's range. None leaves the kind out; if all three are None, the
       spatial range is 2.
    2. `<kind>_attention_timestep_skip_range` is its window in timesteps, which are not rounded (`exact`).
    3. `<kind>_attention_block_identifiers` are patterns, searched in module names, that restrict the kind to layers.

    Each kind keeps its own range, whereas diffusers' default patterns give Latte's temporal blocks the spatial range.
    diffusers compares the timestep with its window, this package `int(t)`: they differ for a fractional timestep less
    than 1 above the lower bound.

    Args:
        config: diffusers' config.
        sublayers: of the model, `pab.sublayers(model)`; required if the identifiers are not diffusers' defaults.

    Raises:
        TypeError: `config` is not such a config.
        ValueError: a value is not supported, or the identifiers need `sublayers`.
    """
    if not all(hasattr(config, f"{kind}_attention_block_skip_range") for kind in _ATTENTIONS):
        raise TypeError(f"from_diffusers takes diffusers' PyramidAttentionBroadcastConfig, got {type(config).__name__}")
    ranges = {kind: getattr(config, f"{kind}_attention_block_skip_range") for kind in _ATTENTIONS}
    if all(reach is None for reach in ranges.values()):
        ranges["spatial"] = 2
    rules: dict[str, Any] = {}
    for kind, reach in ranges.items():
        if reach is None:
            continue
        named, layers = _identified(config, kind, sublayers)
        if named:
            window = _window(
                f"{kind}_attention_timestep_skip_range", getattr(config, f"{kind}_attention_timestep_skip_range")
            )
            rules[kind] = Broadcast(reach, window, "timestep", layers=layers, exact=True)
    return PABConfig(**rules)


def _identified(config: Any, kind: str, sublayers: Sequence[Sublayer] | None) -> tuple[bool, tuple[int, ...] | None]:
    """Whether the identifiers match any sublayer of a kind, and the layers to which they restrict it."""
    field = f"{kind}_attention_block_identifiers"
    patterns = tuple(getattr(config, field))
    if sublayers is None:
        own = {f.name: f.default for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else {}
        if patterns != own.get(field):
            raise ValueError(f"{field} {patterns} name modules of a model; pass sublayers=pab.sublayers(model)")
        return True, None
    of_kind = [s for s in sublayers if s.kind == kind]
    matched = {s.name: any(re.search(pattern, s.name) for pattern in patterns) for s in of_kind}
    layers = {s.layer for s in of_kind if matched[s.name]}
    if torn := sorted(layers & {s.layer for s in of_kind if not matched[s.name]}):
        some = f"some and not all {kind} sublayers of layer {torn[0]}"
        raise ValueError(f"{field} {patterns} name {some}; a rule applies to whole layers")
    return bool(layers), None if all(matched.values()) else tuple(sorted(layers))


def _window(name: str, pair: Any) -> tuple[float, float]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{name} must be two timesteps (lo, hi), got {pair!r}")
    return pair[0], pair[1]


# VideoSys


def from_videosys(*, cache_point: CachePoint = "pre_gate", **arguments: Any) -> PABConfig:
    """The rules of VideoSys's keyword arguments.

    1. `<kind>_broadcast`, `<kind>_range`, `<kind>_threshold` for spatial, temporal and cross: if broadcast is true, the
       range and the window (`lo < int(t) < hi`) of the kind.
    2. `mlp_broadcast` and the tables `mlp_spatial_broadcast_config` and `mlp_temporal_broadcast_config`,
       `{timestep: {"block": [...], "skip_count": n}}`: the MLPs of these blocks are computed at the timestep and reused
       at the next n steps. If two points of a block are closer than n, the later one is reused.

    Args:
        cache_point: which output is kept. VideoSys keeps gated outputs ("post_gate") for Open-Sora and Latte.
        arguments: VideoSys's; an omitted one is off.

    Raises:
        ValueError: an argument is unknown or missing, or rules cannot express a table: different tables for spatial
            and temporal blocks, or several skip counts for one block.

    >>> from_videosys(spatial_broadcast=True, spatial_range=2, spatial_threshold=[100, 800]).spatial.window
    (100, 800)
    """
    if unknown := [name for name in arguments if name not in _VIDEOSYS]:
        raise ValueError(
            f"VideoSys has no argument {', '.join(map(repr, unknown))}; supported are {', '.join(_VIDEOSYS)}"
        )
    rules: dict[str, Any] = {}
    for kind in _ATTENTIONS:
        if not arguments.get(f"{kind}_broadcast"):
            continue
        for name in (f"{kind}_range", f"{kind}_threshold"):
            if arguments.get(name) is None:
                raise ValueError(f"{kind}_broadcast is on and {name} is missing; pass it, or {kind}_broadcast=False")
        window = _window(f"{kind}_threshold", arguments[f"{kind}_threshold"])
        rules[kind] = Broadcast(arguments[f"{kind}_range"], window, "timestep")
    if not arguments.get("mlp_broadcast"):
        return PABConfig(**rules, cache_point=cache_point)
    tables = [_mlp_rules(name, arguments[name]) for name in _MLP_TABLES if arguments.get(name) is not None]
    if not tables:
        raise ValueError(
            f"mlp_broadcast is on and no table is given; pass {' and '.join(_MLP_TABLES)}, or mlp_broadcast=False"
        )
    if tables[0] != tables[-1]:
        raise ValueError(
            f"{' and '.join(_MLP_TABLES)} differ; one MLP rule holds for spatial and temporal blocks: pass equal tables"
        )
    if len(tables[0]) == 1:
        return PABConfig(**rules, mlp=tables[0][0], cache_point=cache_point)
    return PABConfig(**rules, rules=tuple(("mlp", rule) for rule in tables[0]), cache_point=cache_point)


def _mlp_rules(name: str, table: Any) -> list[Broadcast]:
    """A rule for each group of blocks that have the same points."""
    points: dict[int, dict[int, int]] = {}  # block: {timestep: skip count}
    for timestep, entry in _table_entries(name, table):
        for block in entry["block"]:
            points.setdefault(block, {})[timestep] = entry["skip_count"]
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # (skip count, timesteps): blocks
    for block, skips in sorted(points.items()):
        counts = set(skips.values())
        if len(counts) > 1:
            got = ", ".join(map(str, sorted(counts)))
            raise ValueError(f"{name} has skip counts {got} for block {block}; one for all its timesteps is supported")
        groups.setdefault((counts.pop(), tuple(sorted(skips))), []).append(block)
    return [Broadcast(n + 1, unit="timestep", at=at, layers=tuple(blocks)) for (n, at), blocks in groups.items() if n]


def _table_entries(name: str, table: Any) -> Iterable[tuple[int, Mapping[str, Any]]]:
    shape = '{timestep: {"block": [...], "skip_count": n}}'
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} must be {shape}, got {table!r}")
    for timestep, entry in table.items():
        whole = isinstance(timestep, SupportsIndex) or str(timestep).isdecimal()  # keys of JSON are strings
        if not whole or not isinstance(entry, Mapping) or set(entry) != {"block", "skip_count"}:
            raise ValueError(f"{name} must be {shape}, got the entry {timestep!r}: {entry!r}")
        blocks, count = entry["block"], entry["skip_count"]
        if not isinstance(blocks, (list, tuple)) or not all(isinstance(v, int) and v >= 0 for v in (*blocks, count)):
            got = f"{timestep!r}: {entry!r}"
            raise ValueError(f"{name} must have blocks and skip counts that are whole numbers from 0, got {got}")
        yield int(timestep), entry


# Masks of steps


def from_steps_masks(**masks: Sequence[int] | str) -> PABConfig:
    """The rules that compute at the steps where a mask is 1 and reuse where it is 0.

    cache-dit's `steps_mask` is a mask for the whole transformer: `from_steps_masks(block=mask)`.

    Args:
        masks: by kind; a mask is a sequence of 1 and 0, or a string such as "11100101", with one entry a step.

    Raises:
        ValueError: a kind is unknown, a mask has other entries or begins with 0, or the lengths differ.

    >>> from_steps_masks(block="110010").block.at
    (0, 1, 4)
    """
    rules: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for kind, mask in masks.items():
        if kind not in KINDS:
            raise ValueError(f"a mask is for a kind, got {kind!r}; kinds are {', '.join(KINDS)}")
        entries = islice(mask, MOST_STEPS + 1) if isinstance(mask, Iterable) else ()
        cells = [str(int(cell)) if cell in (0, 1, "0", "1") else "?" for cell in entries]
        if "?" in cells or cells[:1] != ["1"]:
            raise ValueError(
                f"the mask of {kind} must be a row of 1 (compute) and 0 (reuse) that begins with 1, got {shown(mask)}"
            )
        check_steps(len(cells), f"the steps of the mask of {kind}")
        lengths[kind] = len(cells)
        longest = max(map(len, "".join(cells).split("1")))
        rules[kind] = Broadcast(longest + 1, unit="step", at=tuple(i for i, cell in enumerate(cells) if cell == "1"))
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{kind} {n}" for kind, n in lengths.items())
        raise ValueError(f"masks of one schedule must have one length, got {got}")
    return PABConfig(**rules)


def to_steps_masks(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The computed steps of a plan as one mask for each kind: 1 computes, 0 reuses or lies in a reused block.

    `from_steps_masks(**masks)` is a config with the same plan. Steps before the first step of the plan are 1.

    Args:
        plan: of a config, `pab.plan(config, num_steps=)`, or of a model, `pab.summary(model).plan`.

    Returns:
        The masks by kind.

    Raises:
        ValueError: the layers of a kind differ.

    >>> from pab_kernels import plan
    >>> to_steps_masks(plan(PABConfig(spatial=2), num_steps=8))
    {'spatial': (1, 1, 1, 0, 1, 0, 1, 1)}
    """
    masks: dict[str, tuple[int, ...]] = {}
    for sublayer in plan.sublayers:
        computed = [int(d.action in (Action.COMPUTE, Action.STORE)) for d in plan.rows[sublayer.name]]
        mask = (1,) * plan.schedule.begin + tuple(computed)
        if masks.setdefault(sublayer.kind, mask) != mask:
            labels = ", ".join(label for label, _ in plan.grouped() if label.partition(" ")[0] == sublayer.kind)
            raise ValueError(f"a mask is for all layers of a kind, got {labels}; use rules without layers=")
    return {kind: masks[kind] for kind in KINDS if kind in masks}
