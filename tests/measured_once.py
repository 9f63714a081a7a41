"""The costs of a call of a model, for which it runs on the meta device, for seconds: measured once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pab_kernels.analysis.forecasts.measure import measure
from pab_kernels.broadcast.costs import call_costs
from pab_kernels.rules.plan import Sublayer

MEASURED: dict[Any, Any] = {}
"""By function, modules, config and dtypes of the model, sublayers and arguments."""


def _once(function: Callable[..., Any], model: nn.Module, sublayers: Sequence[Sublayer], key: Any, *args: Any) -> Any:
    config = str(getattr(model, "config", None))
    key = (function, repr(model), config, tuple(p.dtype for p in model.parameters()), tuple(sublayers), key)
    if key not in MEASURED:
        MEASURED[key] = function(model, *args)
    return MEASURED[key]


def measure_once(model: nn.Module, inputs: Mapping[str, Any], sublayers: Sequence[Sublayer]) -> Any:
    """`measure`, once for each model and shapes of its inputs."""
    given = pytree.tree_map_only(Tensor, lambda t: (t.shape, t.dtype), dict(inputs))
    return _once(measure, model, sublayers, str(given), inputs, sublayers)


def call_costs_once(model: nn.Module, sublayers: Sequence[Sublayer], arguments: Any, unprojected: bool = False) -> Any:
    """`call_costs`, once for each model and arguments."""
    return _once(call_costs, model, sublayers, (arguments, unprojected), sublayers, arguments, unprojected)
