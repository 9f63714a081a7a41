"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Import `module`, which comes with `pip install 'pab-kernels[demo]'`.

    Args:
        module: full name.
        purpose: what needs it, for the error.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the purpose and the install command.
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


def require_all(purpose: str, *modules: str) -> None:
    """`require` each of `modules`."""
    for module in modules:
        require(module, purpose)
