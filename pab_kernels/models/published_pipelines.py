"""Published models that no class of diffusers loads whole: Open-Sora 1.2, Open-Sora-Plan 1.1 and 1.2, by name.

Each is put together from its parts: transformer, autoencoder, text encoder and tokenizer, from folders or from the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..extras import require
from ..files import path_of
from ..messages import first_line, shown


@dataclass(frozen=True)
class Part:
    """A part of a pipeline.

    Args:
        load: from a folder or hub id: `load(source, subfolder=..., local_files_only=..., dtype=...)`; a tokenizer
            takes no dtype.
        hub_id: where it was published.
        subfolder: of that; None for its top.
        typed: whether it has weights.
    """

    load: Callable[..., Any]
    hub_id: str
    subfolder: str | None = None
    typed: bool = True


def _open_sora() -> tuple[Callable[..., Any], dict[str, Part]]:
    transformers = require("transformers", "Open-Sora")
    from .open_sora.pipeline import OpenSoraPipeline
    from .open_sora.vae import OpenSoraVAE
    from .stdit3 import STDiT3

    return OpenSoraPipeline, {
        "transformer": Part(STDiT3.from_pretrained, "hpcai-tech/OpenSora-STDiT-v3"),
        "vae": Part(OpenSoraVAE.from_pretrained, "hpcai-tech/OpenSora-VAE-v1.2"),
        "text_encoder": Part(transformers.T5EncoderModel.from_pretrained, _T5),
        "tokenizer": Part(transformers.AutoTokenizer.from_pretrained, _T5, typed=False),
    }


def _open_sora_plan(
    version: str, text: str, encoder: str, make: str
) -> Callable[[str], tuple[Callable[..., Any], dict[str, Part]]]:
    def parts(variant: str) -> tuple[Callable[..., Any], dict[str, Part]]:
        transformers = require("transformers", "Open-Sora-Plan")
        require("diffusers", "Open-Sora-Plan")
        from .open_sora_plan import pipelines
        from .open_sora_plan.causal_vae import CausalVAE
        from .open_sora_plan.transformers import load_transformer

        hub_id = f"LanguageBind/Open-Sora-Plan-v{version}"
        return getattr(pipelines, make), {
            "transformer": Part(load_transformer, hub_id, variant),
            "vae": Part(CausalVAE.from_pretrained, hub_id, "vae"),
            "text_encoder": Part(getattr(transformers, encoder).from_pretrained, text),
            "tokenizer": Part(transformers.AutoTokenizer.from_pretrained, text, typed=False),
        }

    return parts


_T5 = "DeepFloyd/t5-v1_1-xxl"


@dataclass(frozen=True)
class Published:
    """A published model.

    Args:
        variants: names of its checkpoints, the usual one first; () if there is one.
        parts: what it consists of, and what puts that together, for a variant.
    """

    variants: tuple[str, ...]
    parts: Callable[[str], tuple[Callable[..., Any], dict[str, Part]]]


PUBLISHED = {
    "open-sora-1.2": Published((), lambda variant: _open_sora()),
    "open-sora-plan-1.1": Published(
        ("65x512x512", "221x512x512"),
        _open_sora_plan("1.1.0", _T5, "T5EncoderModel", "version_11"),
    ),
    "open-sora-plan-1.2": Published(
        ("93x480p", "29x480p", "29x720p", "93x720p"),
        _open_sora_plan("1.2.0", "google/mt5-xxl", "MT5EncoderModel", "version_12"),
    ),
}
"""By name."""


def is_published(name: str) -> bool:
    """Whether `load` knows a name."""
    return name.partition("/")[0] in PUBLISHED


def load(
    name: str,
    weights: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
) -> Any:
    """Put a published model together.

    Args:
        name: in `PUBLISHED`, perhaps with a variant: "open-sora-plan-1.2/29x720p".
        weights: a folder with the parts in folders of their names: `transformer` (or that of the variant), `vae`,
            `text_encoder`, `tokenizer`. Those that it lacks are taken from the hub.
        dtype: of the weights; default float32.
        local_files_only: fetch nothing; parts from the hub must be cached.

    Returns:
        An `OpenSoraPipeline`, `OpenSoraPlan11Pipeline` or `OpenSoraPlan12Pipeline`.

    Raises:
        ValueError: there is no such model or variant, or a part is missing or is of another model; the message says
            which, and where it comes from.
        FileNotFoundError: there is no folder `weights`.
        ModuleNotFoundError: diffusers or transformers is not installed.
    """
    model, _, variant = name.partition("/")
    if model not in PUBLISHED:
        raise ValueError(f"there is no published model {shown(model)}; supported are {', '.join(PUBLISHED)}")
    known = PUBLISHED[model].variants
    if variant and variant not in known:
        listed = ", ".join(f"{model}/{one}" for one in known) or model
        raise ValueError(f"{model} has no variant {shown(variant)}; supported are {listed}")
    folder = None if weights is None else path_of(weights).expanduser()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    put_together, parts = PUBLISHED[model].parts(variant or next(iter(known), ""))
    loaded = {}
    for part, how in parts.items():
        source, subfolder = _place(folder, part, how)
        typed = {"dtype": dtype or torch.float32} if how.typed else {}
        inside = {} if subfolder is None else {"subfolder": subfolder}
        try:
            loaded[part] = how.load(source, local_files_only=local_files_only, **inside, **typed)
        except Exception as error:  # of other packages, about files that anybody wrote
            published = how.hub_id if how.subfolder is None else f"{how.hub_id}, folder {how.subfolder}"
            of = f"no folder {part} in {folder}" if folder is not None and source == how.hub_id else first_line(error)
            raise ValueError(
                f"{name} lacks its {part}: {of}; it is published as {published} on the hub: fetch it, or give "
                f"--weights FOLDER with a folder {part}"
            ) from error
    return put_together(**loaded)


def _place(folder: Path | None, part: str, how: Part) -> tuple[str, str | None]:
    """Where a part is taken from, and its folder there."""
    for name in (how.subfolder, part) if folder is not None else ():
        if name and (folder / name).is_dir():  # type: ignore[operator]
            return str(folder), name
    return how.hub_id, how.subfolder
