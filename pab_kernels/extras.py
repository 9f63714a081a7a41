"""Packages that only some parts need: imported where they are used, with one line that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Import `module`, which comes with `pip install 'pab-kernels[demo]'`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what needs it and how to install it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'pab-kernels[demo]'",
            name=package,
        ) from None
