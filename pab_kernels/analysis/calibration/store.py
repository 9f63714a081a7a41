"""Finished generations of a calibration, in a folder, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ...files import replacing


class Store:
    """Values by a hash of what made them: files of a folder, or in memory.

    Args:
        folder: made if missing; None for memory.
        sampling: what all generations have in common: model, scheduler, steps.
    """

    def __init__(self, folder: Path | None, sampling: dict[str, Any]) -> None:
        self._folder = folder
        self._sampling = sampling
        self._held: dict[str, dict[str, Any]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def name(self, **made_by: Any) -> str:
        """The hash of a generation."""
        text = json.dumps(self._sampling | made_by, sort_keys=True, default=self._hashed)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _hashed(self, value: Any) -> str:
        """What tells a value from another, in this process and in the next.

        Raises:
            TypeError: it is of a type of which that is not known, and a folder outlives the process.
        """
        if isinstance(value, torch.Tensor):
            bytes_of = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bytes_of).hexdigest()}"
        if hasattr(value, "tobytes"):  # arrays and images
            return f"{type(value).__name__} {hashlib.sha256(value.tobytes()).hexdigest()}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return json.dumps(vars(value), sort_keys=True, default=self._hashed)
        if self._folder is not None:
            raise TypeError(
                f"got a prompt with a {type(value).__name__}; with folder= texts, numbers, tensors, arrays and images "
                "are supported, which are told apart in a later process: leave folder out"
            )
        return repr(value)

    def get(self, name: str) -> dict[str, Any] | None:
        """The value that was put, or None. A file that cannot be read counts as missing."""
        if self._folder is None:
            return self._held.get(name)
        path = self._folder / f"{name}.pt"
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises what the damaged bytes lead to; the generation is repeated
            return None
        return found

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Keep a value of tensors, numbers, strings, lists and dicts.

        Raises:
            OSError: the file cannot be written.
        """
        if self._folder is None:
            self._held[name] = value
            return
        with replacing(self._folder / f"{name}.pt") as made:
            torch.save(value, made)
