"""A transformer without its weights: its config by name, hub id or file, and the module on the meta device."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...compat import float32_modules
from ...extras import require
from ...files import path_of, read_text
from ...messages import first_line, joined, shortened
from ...models.open_sora_plan.transformers import VERSIONS
from ...models.open_sora_plan.transformers import build as open_sora_plan
from ...strict_json import from_json
from .families import FAMILIES, family, unknown_family
from .model_calls import MODEL_CALLS, Size

_FILE = "config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """The config of a transformer.

    Args:
        name: as given by the user.
        class_name: a key of `MODEL_CALLS`.
        config: arguments of the class.
        size, steps: the usual ones of a known family.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    size: Size | None = None
    steps: int | None = None


def find_config(model: str | Path | Mapping[str, Any]) -> Source:
    """The config of a transformer.

    Args:
        model: a name or hub id in `FAMILIES`; the path of a config.json, or of a folder that has one, possibly in
            `transformer`; another hub id, whose config.json is fetched if it is not cached; or the config itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model is not known, or its config is not one of a supported class.
    """
    if isinstance(model, Mapping):
        return _source("the config", model)
    name = str(model)
    known = family(name)
    if known is not None:
        return Source(name, known.config["_class_name"], known.config, known.sizes[0], known.steps)
    path = path_of(name)
    if os.path.exists(path) or path.suffix == ".json":
        return _source(name, _read(_file(path)))
    if _HUB_ID.fullmatch(name):
        return _source(name, _read(_fetched(name)))
    raise unknown_family(name)


def _file(path: Path) -> Path:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no {shortened(str(path))}")
    if not os.path.isdir(path):
        return path
    found = next((p for p in (path / _FILE, path / "transformer" / _FILE) if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} has no {_FILE} and no transformer/{_FILE}")
    return found


def _read(path: Path) -> Mapping[str, Any]:
    text = read_text(path)
    try:
        data = from_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} does not hold a config, but {type(data).__name__}")
    return data


def _fetched(hub_id: str) -> Path:
    """The config.json of a hub id, from the cache or else from the hub; weights are never fetched."""
    hub = require("huggingface_hub", "a hub id")
    errors = require("huggingface_hub.errors", "a hub id")
    names = (f"transformer/{_FILE}", _FILE)
    try:
        for name in names:
            cached = hub.try_to_load_from_cache(hub_id, name)
            if isinstance(cached, str):
                return Path(cached)
        try:
            return Path(hub.hf_hub_download(hub_id, names[0]))
        except errors.LocalEntryNotFoundError:  # derives from the next, but means that the hub was not reached
            raise
        except errors.EntryNotFoundError:
            return Path(hub.hf_hub_download(hub_id, names[1]))
    # the bases are the errors of the HTTP client, which depends on the version of huggingface_hub
    except (OSError, errors.EntryNotFoundError, errors.HFValidationError, *errors.HfHubHTTPError.__bases__) as error:
        raise ValueError(
            f"the config of {hub_id} is not cached and cannot be fetched: {_reason(errors, error)}; "
            f"give the path of a config.json or one of {', '.join(FAMILIES)}"
        ) from None


def _reason(errors: Any, error: Exception) -> str:
    """Why a file could not be fetched, in a few words."""
    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    reasons = {
        errors.HFValidationError: "this is no hub id",
        errors.LocalEntryNotFoundError: "the hub cannot be reached",
        errors.GatedRepoError: "its terms must be accepted on the hub first, then `hf auth login`",
        errors.RepositoryNotFoundError: "the hub has no such repository, or it is private: `hf auth login`",
        errors.EntryNotFoundError: f"it has no transformer/{_FILE} and no {_FILE}",
    }
    return next((reason for kind, reason in reasons.items() if isinstance(error, kind)), joined(error))


def _source(name: str, config: Mapping[str, Any]) -> Source:
    architectures = config.get("architectures")
    class_name = config.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    if not isinstance(class_name, str):
        raise ValueError(f"{name} names no class: a transformer's config has _class_name")
    if class_name not in MODEL_CALLS:
        hint = ": give the config.json of its transformer" if class_name.endswith("Pipeline") else ""
        raise ValueError(f"{name} is a {class_name}; supported are {', '.join(MODEL_CALLS)}{hint}")
    return Source(name, class_name, config)


def build(source: Source, dtype: torch.dtype) -> Any:
    """Create a transformer on the meta device with the dtypes that loading it in `dtype` gives.

    Some classes keep modules in float32.

    Args:
        source: its class and config.
        dtype: of the model.

    Raises:
        ValueError: the class does not take this config.
        ModuleNotFoundError: diffusers is not installed.
    """
    make = _maker(source.class_name)
    try:
        with torch.device("meta"):
            model = make(source.config)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{source.name}: {source.class_name} does not take this config: {first_line(error)}") from None
    in_float32 = float32_modules(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if in_float32 & set(name.split(".")) else dtype)
    return model.eval().requires_grad_(False)


def _maker(class_name: str) -> Callable[[Mapping[str, Any]], Any]:
    """What makes a model of a class from its config."""
    if class_name == "STDiT3":
        from ...models.stdit3 import STDiT3

        return STDiT3.from_config
    if class_name in VERSIONS:
        return open_sora_plan
    made: Callable[[Mapping[str, Any]], Any] = getattr(
        require("diffusers", "a model of diffusers"), class_name
    ).from_config
    return made
