"""Models that load their published checkpoint, in a format that diffusers does not read, and what diffusers saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from ..extras import require
from ..files import path_of
from ..messages import shown
from .weights_file import read_config, read_weights

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "checkpoint.ckpt",
)
"""Names of a file of weights; the first that is there is read."""
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_TRAINING = "loss."
"""Names of tensors of the training beside those of the model begin with it."""


class PublishedModel(ModelMixin, ConfigMixin):
    """A model of diffusers whose checkpoint was published in another format."""

    @classmethod
    @abstractmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the class from the config.json of a published checkpoint.

        Raises:
            ValueError: it is of another model, or of a variant that is not supported.
        """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Any:
        """Load a published checkpoint, or a folder of `save_pretrained`, which is left to diffusers.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository on the hub, with config.json and the
                first of `WEIGHTS` that is there. Of pickled files only tensors are read.
            subfolder: of it.
            dtype, torch_dtype: of the weights, by both of diffusers' names; default float32.
            options: `HUB_OPTIONS`, and for a folder of `save_pretrained` all of diffusers' `from_pretrained`.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: the checkpoint is of another model, or an option does not suit it.
            FileNotFoundError: there is no such checkpoint.
        """
        source = str(path_of(pretrained_model_name_or_path))
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        dtype = dtype or torch_dtype
        config = read_config(find_file(source, (cls.config_name,), subfolder, hub))
        if config.get("_class_name") == cls.__name__:
            return super().from_pretrained(source, subfolder=subfolder, torch_dtype=dtype, **options)
        unsuited = sorted(options.keys() - set(HUB_OPTIONS))
        if unsuited:
            raise ValueError(
                f"{', '.join(unsuited)} suits a folder of save_pretrained, not the published checkpoint {source}; "
                f"supported are dtype, subfolder, {', '.join(HUB_OPTIONS)}"
            )
        arguments = cls.translated(config)
        path = find_file(source, WEIGHTS, subfolder, hub)
        tensors = read_tensors(path)
        with torch.device("meta"):
            model = cls(**arguments)
        expected = model.state_dict()
        for what, names in (("lacks", expected.keys() - tensors), ("has unknown", tensors.keys() - expected)):
            if names:
                raise ValueError(f"{path} is of another model: it {what} {_some(names)}")
        other = [name for name in expected if tensors[name].shape != expected[name].shape]
        if other:
            got, wanted = (list(t[other[0]].shape) for t in (tensors, expected))
            raise ValueError(f"{path} is of another model: {other[0]} has the shape {got}, its config needs {wanted}")
        model.load_state_dict({name: t.to(dtype or torch.float32) for name, t in tensors.items()}, assign=True)
        return model.eval()


def find_file(source: str, names: Sequence[str], subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    """The first of `names` in a folder or, cached or fetched, in a repository on the hub.

    Args:
        source: the folder, or the id of the repository.
        names: of files.
        subfolder: of the source.
        hub: options of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: none of them is there.
    """
    place = Path(source).expanduser()
    folder = place.is_dir()
    if folder:
        for path in (Path(place, subfolder or "", name) for name in names):
            if path.is_file():
                return path
    else:
        download = require("huggingface_hub", "a hub id").hf_hub_download
        errors = require("huggingface_hub.errors", "a hub id")
        for name in names:
            try:
                return Path(download(source, name, subfolder=subfolder, **hub))
            except (errors.EntryNotFoundError, errors.HFValidationError, errors.RepositoryNotFoundError):
                continue
    where = f"{source}/{subfolder}" if subfolder else source
    unreached = "" if folder else ", is no folder, and has none cached if the hub cannot be reached"
    raise FileNotFoundError(f"{where} has no {' or '.join(names)}{unreached}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name.

    Of a training's checkpoint the averaged weights are read if it has them, and nothing of its loss.

    Raises:
        ValueError: see `read_weights`.
    """
    tensors = read_weights(path)
    averaged = tensors.get("ema_state_dict")
    if averaged:
        return {name.removeprefix("module."): tensor for name, tensor in averaged.items()}
    tensors = tensors.get("state_dict", tensors)
    tensors = tensors.get("gen_model", tensors)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_TRAINING)}


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return shown(first)[1:-1] + (f" and {len(names) - 3} more" if len(names) > 3 else "")
