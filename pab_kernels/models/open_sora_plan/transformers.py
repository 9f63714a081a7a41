"""The transformers of Open-Sora-Plan 1.1 (`LatteT2V`) and 1.2 (`OpenSoraT2V`), in classes of diffusers.

Both have the parameter names of a diffusers class, which computes the same:

| version | class in its config.json | class of diffusers | what differs |
|---|---|---|---|
| 1.1 | LatteT2V | LatteTransformer3DModel | frames are positions `i / s`; a buffer of an empty caption is not used |
| 1.2 | OpenSoraT2V | AllegroTransformer3DModel | names in its config |

Source: PKU-YuanGroup/Open-Sora-Plan, tags v1.1.0 and v1.2.0.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...extras import require
from ...files import path_of
from ...messages import shown
from ..weights_file import read_config


@dataclass(frozen=True)
class Version:
    """One version of Open-Sora-Plan.

    Args:
        name: of its preset.
        serves: the class of diffusers.
        needs: what its config must say, by name.
        config: the config of the diffusers class from that of the checkpoint.
        unused: names in the checkpoint that nothing reads.
    """

    name: str
    serves: str
    needs: Mapping[str, tuple[Any, ...]]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    unused: tuple[str, ...] = ()


_SHARED = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "cross_attention_dim",
    "attention_bias",
    "patch_size",
    "activation_fn",
    "norm_elementwise_affine",
    "norm_eps",
    "caption_channels",
)


def _latte(config: Mapping[str, Any]) -> dict[str, Any]:
    side, *_ = _pair(config["sample_size"])
    return {
        "sample_size": side,
        "video_length": config["video_length"],
        "norm_type": config["norm_type"],
        "num_embeds_ada_norm": config.get("num_embeds_ada_norm"),
    }


def _allegro(config: Mapping[str, Any]) -> dict[str, Any]:
    height, width = _pair(config["sample_size"])
    frames = config["sample_size_t"]
    scales = {f"interpolation_scale_{axis}": config.get(f"interpolation_scale_{axis}") for axis in "thw"}
    usual = {
        "interpolation_scale_t": (frames - 1) // 16 + 1 if frames % 2 else frames / 16,
        "interpolation_scale_h": height / 30,
        "interpolation_scale_w": width / 40,
    }
    return {"sample_height": height, "sample_width": width, "sample_frames": frames} | {
        name: usual[name] if scale is None else scale for name, scale in scales.items()
    }


VERSIONS = {
    "LatteT2V": Version(
        "open-sora-plan-1.1",
        "LatteTransformer3DModel",
        {
            "norm_type": ("ada_norm_single",),
            "use_rope": (None, False),
            "compress_kv_factor": (None, 1),
            "patch_size_t": (None, 1),
        },
        _latte,
        ("caption_projection.y_embedding",),
    ),
    "OpenSoraT2V": Version(
        "open-sora-plan-1.2",
        "AllegroTransformer3DModel",
        {
            "use_rope": (True,),
            "downsampler": (None,),
            "use_stable_fp32": (None, False),
            "patch_size_t": (None, 1),
            "norm_type": (None, "ada_norm_single"),
        },
        _allegro,
    ),
}
"""By the class that a checkpoint's config.json names."""


def version_of(config: Mapping[str, Any]) -> Version:
    """The version of a checkpoint, by its config.json.

    Raises:
        ValueError: it is of another model, or of a variant that no class of diffusers computes.
    """
    name = config.get("_class_name")
    if name not in VERSIONS:
        raise ValueError(f"config.json names the class {shown(name)}; supported are {', '.join(VERSIONS)}")
    version = VERSIONS[name]
    for field, allowed in version.needs.items():
        if config.get(field) not in allowed:
            listed = " or ".join(map(repr, allowed))
            raise ValueError(
                f"a {name} with {field}={shown(config.get(field))} is not supported, only with {listed}: "
                f"{version.serves} computes nothing else"
            )
    return version


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the diffusers class that serves a checkpoint, from the checkpoint's config.json.

    Raises:
        ValueError: see `version_of`; or a field is missing.
    """
    version = version_of(config)
    try:
        shared = {name: config[name] for name in _SHARED if name in config} | version.config(config)
    except KeyError as error:
        raise ValueError(f"config.json of a {config['_class_name']} needs {error.args[0]}") from None
    return shared | {"out_channels": config.get("out_channels") or config["in_channels"]}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The diffusers class for a checkpoint's config.json, with random weights.

    Raises:
        ValueError: see `translated`.
        ModuleNotFoundError: diffusers is not installed.
    """
    diffusers = require("diffusers", "Open-Sora-Plan")
    model: nn.Module = getattr(diffusers, version_of(config).serves)(**translated(config))
    return with_positions(model)


def load_transformer(
    checkpoint: str | Path,
    *,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load the transformer of Open-Sora-Plan 1.1 or 1.2.

    Args:
        checkpoint: a folder with config.json and weights (safetensors, or pickled ones, of which only tensors are
            read), or the id of a repository: `LanguageBind/Open-Sora-Plan-v1.1.0` or `-v1.2.0`.
        subfolder: of it: "65x512x512", "221x512x512"; "29x480p", "93x480p", "29x720p", "93x720p".
        dtype: of the weights; default float32.
        local_files_only: fetch nothing.

    Returns:
        A `LatteTransformer3DModel` or an `AllegroTransformer3DModel`.

    Raises:
        ValueError: the checkpoint is of another model, or names of its tensors are missing or not known.
        FileNotFoundError: there is no such checkpoint.
        ModuleNotFoundError: diffusers is not installed.
    """
    diffusers = require("diffusers", "Open-Sora-Plan")
    from ..published import find_file

    source = str(path_of(checkpoint).expanduser())
    where = {"subfolder": subfolder, "local_files_only": local_files_only}
    config = read_config(find_file(source, ("config.json",), subfolder, {"local_files_only": local_files_only}))
    version, wanted = version_of(config), translated(config)
    serves = getattr(diffusers, version.serves)
    with _quiet():
        model, info = serves.from_pretrained(
            source, torch_dtype=dtype or torch.float32, output_loading_info=True, **where, **wanted
        )
    unknown = [name for name in info["unexpected_keys"] if name not in version.unused]
    for what, names in (("lacks", info["missing_keys"]), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"the checkpoint {what} {', '.join(sorted(names)[:3])}{more}; it is no {version.name}")
    return with_positions(model)


def with_positions(model: nn.Module) -> nn.Module:
    """A Latte model whose L frames have the positions `i / s` of Open-Sora-Plan 1.1; other models are unchanged.

        s = max((L - 1) // 16 if L is odd else L // 16, 1)

    With 17 latent frames s is 1, with 56 it is 3.
    """
    table = getattr(model, "temp_pos_embed", None)
    if table is not None:
        _, length, width = table.shape
        s = max((length - 1) // 16 if length % 2 else length // 16, 1)
        angles = torch.outer(
            torch.arange(length, dtype=torch.float64) / s,
            10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2)),
        )
        model.temp_pos_embed = torch.cat([angles.sin(), angles.cos()], dim=1)[None].to(table)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of diffusers about the config of another class and the unused buffer, which are known."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
