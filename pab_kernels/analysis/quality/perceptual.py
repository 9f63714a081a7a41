"""LPIPS, from an optional package."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import torch

from ...messages import first_line

Distance = Callable[[np.ndarray, np.ndarray], float]
"""A distance of two frames `[3, height, width]`, black 0 and white 1."""

MISSING = (
    "neither the package lpips nor torchmetrics with torchvision is installed: pip install lpips "
    "(it brings torchvision, and with it another torch where yours is built for the CPU alone)"
)


def load_lpips() -> Distance:
    """LPIPS (Zhang et al. 2018) with AlexNet, from the package lpips, else from torchmetrics: 0 for equal frames.

    Raises:
        ModuleNotFoundError: neither package is installed.
        RuntimeError: the network cannot be loaded. Both packages fetch AlexNet's weights at the first use.
    """
    for package, load in (("lpips", _from_lpips), ("torchmetrics", _from_torchmetrics)):
        try:
            network = load()
        except ModuleNotFoundError:
            continue
        except Exception as error:
            raise RuntimeError(f"{package} cannot load its network: {first_line(error)}") from error
        return lambda a, b: _distance(network, a, b)
    raise ModuleNotFoundError(MISSING, name="lpips")


def _from_lpips() -> Callable[..., torch.Tensor]:
    network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()
    return lambda a, b: network(a, b, normalize=True)


def _from_torchmetrics() -> Callable[..., torch.Tensor]:
    metric = importlib.import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity(
        net_type="alex", normalize=True
    )
    return metric.eval()


@torch.no_grad()
def _distance(network: Callable[..., torch.Tensor], a: np.ndarray, b: np.ndarray) -> float:
    x, y = (torch.from_numpy(np.ascontiguousarray(frame, dtype=np.float32))[None] for frame in (a, b))
    return float(network(x, y))  # of [1, 3, height, width]
