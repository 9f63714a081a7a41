"""Finding the sublayers of any DiT: attention, MLPs and whole blocks, by their contents, names and positions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

from ..rules.config import MODULE_KINDS
from ..rules.plan import Sublayer
from . import evidence

LISTS = (nn.ModuleList, nn.Sequential)


def find(model: nn.Module, kinds: Mapping[str, str | None] | None = None) -> list[Sublayer]:
    """Find the sublayers of `model`.

    1. Attention is a module that projects queries, or has attention in its name and weights. It is `cross` if its keys
       come from another sequence, else `temporal` or `spatial` by the nearest name or class. Attention over all tokens
       at once, or over two sequences jointly, is `spatial`.
    2. A block is an entry of a list whose entries contain attention, as a module or written out in their own code.
    3. An `mlp` is found only in blocks, beside their attention.
    4. Modules that prepare the text or the latents before the blocks (refiners, embedders, poolers) are left alone.

    Args:
        model: the DiT, on any device including "meta".
        kinds: maps patterns of module names to the kind of these modules, or to None to leave them alone. In a pattern,
            `*` matches within one component of a name, `**` matches anything. Later patterns win.
            `{"refiner.*.attn": "spatial"}` adds modules, `{"single_blocks.**": None}` leaves modules out.

    Returns:
        The sublayers in the order of the model's modules, each block after those inside it, with the reason as `why`.

    Raises:
        ValueError: a pattern matches no module, or a kind is unknown.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> block = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": mlp})
    >>> [(s.name, s.kind) for s in find(nn.ModuleDict({"blocks": nn.ModuleList([block])}))]
    [('blocks.0.attn', 'spatial'), ('blocks.0.mlp', 'mlp')]
    """
    modules = dict(model.named_modules())
    given = _given(modules, kinds or {})
    found: dict[str, tuple[str, str]] = {}  # name: kind, why
    for name in modules:
        if name and all(found.get(parent, ("block",))[0] == "block" for parent in _parents(name)):
            judged = _judge(model, modules, name)
            if judged is not None:
                found[name] = judged
    rows = {name: _row(name, modules) for name in found}
    homes = {n: n if kind == "block" else rows[n] or n.rpartition(".")[0] for n, (kind, _) in found.items()}
    with_attention = {homes[n] for n, (kind, _) in found.items() if kind != "mlp"}
    found = {n: judged for n, judged in found.items() if judged[0] != "mlp" or homes[n] in with_attention}
    for block in dict.fromkeys(rows[name] for name in found):
        if block and block not in found and not isinstance(modules[block], evidence.CONTAINERS):
            found[block] = ("block", f"an entry of {block.rpartition('.')[0]} with attention in it")
    for name, kind in given.items():
        found.pop(name, None)
        if kind is not None:
            found[name] = (kind, "given in kinds")
    return _ordered(modules, found)


def _given(modules: Mapping[str, nn.Module], kinds: Mapping[str, str | None]) -> dict[str, str | None]:
    """The kind from `kinds` of each module that matches one of its patterns."""
    given: dict[str, str | None] = {}
    for pattern, kind in kinds.items():
        if kind is not None and kind not in MODULE_KINDS:
            raise ValueError(
                f"kinds[{pattern!r}] is {kind!r}; supported are {', '.join(map(repr, MODULE_KINDS))} and None"
            )
        expression = "".join(
            {"**": ".*", "*": "[^.]*"}.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", pattern)
        )
        matched = [name for name in modules if name and re.fullmatch(expression, name)]
        if not matched:
            raise ValueError(
                f"kinds: no module of the model is named {pattern!r}; in a pattern * matches up to the next dot, ** "
                "matches anything"
            )
        given |= dict.fromkeys(matched, kind)
    return given


def _parents(name: str) -> list[str]:
    """Names of the modules around a module, innermost first, without the model itself."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _around(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> list[tuple[str, nn.Module]]:
    return [(parent.rpartition(".")[2], modules[parent]) for parent in _parents(name)] + [("", model)]


def _judge(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> tuple[str, str] | None:
    """Kind and reason of an attention, an MLP or a block with attention in its own code; None for any other module."""
    module, path = modules[name], name.split(".")
    if isinstance(module, evidence.CONTAINERS) or evidence.set_aside(path):
        return None
    attention = evidence.attention_by(module, path[-1])
    entry = isinstance(modules.get(name.rpartition(".")[0]), LISTS)
    if (
        entry
        and evidence.queries_of(module)
        and any(evidence.mlp_by(m, n.rpartition(".")[2]) for n, m in module.named_modules() if n)
    ):
        return "block", "attention is written out in it, beside an MLP"
    if attention is not None and not _holds_more(module):
        around = _around(model, modules, name)
        cross, why = evidence.keys_from_elsewhere(module, path[-1], around)
        if cross:
            return "cross", f"{attention}; {why}"
        kind, where = evidence.axis(module, path[-1], around)
        return kind, f"{attention}; {why}; {where}"
    mlp = None if attention is not None else evidence.mlp_by(module, path[-1])
    return None if mlp is None else ("mlp", mlp)


def _holds_more(module: nn.Module) -> bool:
    """Whether a module that looks like attention contains more: an MLP or another attention."""
    below = [(name.rpartition(".")[2], m) for name, m in module.named_modules() if name]
    attentions = [m for _, m in below if evidence.queries_of(m)]
    own = bool(evidence.queries_of(module))
    return len(attentions) > (0 if own else 1) or any(evidence.mlp_by(m, name) for name, m in below)


def _row(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The block that a module is in: an entry of the innermost list in which a class repeats, or that has one entry.

    A list whose entries all differ in class is taken for a chain of sublayers inside a block, unless there is no other
    list.
    """
    entries = [parent for parent in _parents(name) if isinstance(modules.get(parent.rpartition(".")[0]), LISTS)]
    for entry in entries:
        classes = Counter(type(m) for m in modules[entry.rpartition(".")[0]].children())
        if len(classes) < sum(classes.values()) or sum(classes.values()) == 1:
            return entry
    return entries[-1] if entries else None


def _ordered(modules: Mapping[str, nn.Module], found: Mapping[str, tuple[str, str]]) -> list[Sublayer]:
    sublayers = []
    for name, (kind, why) in found.items():
        entry = name if kind == "block" else _row(name, modules) or name
        layer = int(index) if (index := entry.rpartition(".")[2]).isdigit() else 0
        block = next((parent for parent in _parents(name) if found.get(parent, ("",))[0] == "block"), None)
        sublayers.append(Sublayer(name, kind, layer, "module", block, why))
    place = {name: i for i, name in enumerate(modules)}
    last = {
        s.name: max(place[n] for n in modules if n == s.name or n.startswith(f"{s.name}."))
        for s in sublayers
        if s.kind == "block"
    }
    return sorted(sublayers, key=lambda s: (last.get(s.name, place[s.name]), s.kind == "block", -s.name.count(".")))
