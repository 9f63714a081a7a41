"""What a module of a DiT is, judged by what it has in it and by its name; every judgement says why.

Names are compared word by word (`attn_temp` is the words attn and temp): a word inside a longer one says nothing.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""What only holds modules and is never called."""

_QUERIES = {"q", "qk", "qkv", "query", "queries", "wq", "wqkv"}
_ATTENTION = {"attn", "attention", "mha", "msa"}
_MLP = {"mlp", "ff", "ffn", "feedforward", "moe"}
_NEITHER = {
    *("norm", "mod", "modulation", "adaln", "ada", "gate", "embed", "embedder", "embedding", "emb", "rope"),
    *("bias", "mask", "processor", "scale", "shift", "table", "time", "timestep"),
}
"""Words of what serves attention or an MLP, and is none."""
_WHOLE = {"block", "layer"}
"""Words of classes that add to the stream what their attention or MLP gives: no sublayer by that name alone."""
_ASIDE = {
    *(
        "refiner",
        "refine",
        "embed",
        "embedder",
        "embedders",
        "embedding",
        "embeddings",
        "emb",
        "pool",
        "pooler",
        "pooling",
    ),
    *("perceiver", "resampler", "connector", "extractor", "text", "txt", "caption", "cap"),
}
"""Words of what prepares the text or the latents before the blocks, and is left alone."""
_TEMPORAL = {"temporal", "temp", "tempo"}
_TIME = {"time", "frame", "frames"}
_MOTION = ({"motion"}, {"animate", "diff"})
"""Words of modules that attend over frames.

A block or model that has `motion` in its class has such modules, and others.
"""
_SPATIAL = {"spatial", "spatio", "space"}
_CROSS = {"cross", "crossattn", "crossattention"}
_ELSEWHERE = {"encoder_hidden_states", "context", "cond", "text", "memory", "y", "kv", "key_value"}


def words(name: str) -> list[str]:
    """The words of a name in lower case: `CrossAttention2D` and `cross_attention_2d` are cross, attention, 2, d."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def set_aside(path: Sequence[str]) -> str | None:
    """The component of a path by which a module prepares text or latents before the blocks, or None.

    Of the last component only the words of refiners and poolers count: attention in a block may be named after the
    stream that it reads.
    """
    for component in path[:-1]:
        if _ASIDE.intersection(words(component)):
            return component
    return (
        path[-1]
        if {"refiner", "pool", "pooler", "pooling", "perceiver", "resampler"}.intersection(words(path[-1]))
        else None
    )


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _matrices(module: nn.Module) -> int:
    """Modules in `module`, itself included, that hold a weight of two or more dimensions."""
    return sum(any(p.ndim >= 2 for p in m.parameters(recurse=False)) for m in module.modules())


def queries_of(module: nn.Module) -> list[str]:
    """Names of the projections of queries that a module holds itself."""
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj"]
    children = [
        name for name, child in module.named_children() if _QUERIES.intersection(words(name)) and _has_matrix(child)
    ]
    return children + [
        n for n, p in module.named_parameters(recurse=False) if p.ndim >= 2 and _QUERIES.intersection(words(n))
    ]


def attention_by(module: nn.Module, name: str) -> str | None:
    """Why a module is attention, or None: it projects queries, or it is called attention and has weights below it.

    Args:
        module: any module.
        name: the last component of its path.
    """
    found = queries_of(module)
    if found:
        return f"attention: projects queries in {found[0]}"
    if (
        isinstance(module, (*CONTAINERS, nn.Sequential))
        or not any(True for _ in module.children())
        or not _has_matrix(module)
    ):
        return None
    for what, said in (("class", type(module).__name__), ("name", name)):
        spoken = words(said)
        if _ATTENTION.intersection(spoken) and not _NEITHER.intersection(spoken) and not _WHOLE.intersection(spoken):
            return f"attention by its {what} {said}"
    return None


def mlp_by(module: nn.Module, name: str) -> str | None:
    """Why a module is an MLP, or None: it is called one and has two weights, or is a chain that ends in the width that
    it begins with."""
    if isinstance(module, CONTAINERS) or _matrices(module) < 2 or _NEITHER.intersection(words(name)):
        return None
    for what, said in (("name", name), ("class", type(module).__name__)):
        spoken = words(said)
        if what == "class" and _WHOLE.intersection(spoken):
            continue
        if _MLP.intersection(spoken) or ("feed", "forward") in zip(spoken, spoken[1:], strict=False):
            return f"MLP by its {what} {said}"
    if isinstance(module, nn.Sequential):
        linears = [m for m in module if isinstance(m, nn.Linear)]
        if len(linears) > 1 and linears[0].in_features == linears[-1].out_features < linears[0].out_features:
            return "MLP: a chain of linear layers that widens and returns to its width"
    return None


def keys_from_elsewhere(module: nn.Module, name: str, parents: Sequence[tuple[str, nn.Module]]) -> tuple[bool, str]:
    """Whether attention takes its keys from another sequence alone (cross attention), and why.

    Joint attention, which projects queries for both sequences or adds keys of the other to its own, is not cross
    attention.

    Args:
        module: the attention.
        name: the last component of its path.
        parents: name and module of what is around it, the innermost first.
    """
    said = [words(name), words(type(module).__name__)]
    if any(_CROSS.intersection(s) for s in said):
        return (
            True,
            "cross attention by its "
            f"{'name ' + name if _CROSS.intersection(said[0]) else 'class ' + type(module).__name__}",
        )
    declared = getattr(module, "is_cross_attention", None)
    joint = _joint(module)
    if "self" not in said[0] and declared is True:
        return True, "keys from elsewhere (is_cross_attention)"
    if joint:
        return False, f"joint: {joint}"
    if any("self" in s for s in said):
        return False, "self attention by its name"
    if _other_width(module):
        return True, "keys from elsewhere: they are projected from another width"
    spoken = words(name)
    if "to" in spoken[1:-1] and _ATTENTION.intersection(spoken):
        return True, f"cross attention by its name {name}"
    if declared is None and spoken[-2:] == ["attn", "2"] and _takes_keys(module, required=False):
        return True, "keys from elsewhere: attn2, with an input for them"
    if declared is None and _takes_keys(module, required=True):
        return True, "keys from elsewhere: its forward needs another sequence"
    if parents and _called_with_other_keys(parents[0][1], name, module):
        return True, "keys from elsewhere: it is called with other keys than queries"
    if parents and _CROSS.intersection(words(type(parents[0][1]).__name__)) and _only_one(parents[0][1]):
        return True, f"cross attention by the class around it, {type(parents[0][1]).__name__}"
    return False, "own keys"


def _joint(module: nn.Module) -> str | None:
    """What shows that attention is over two sequences at once, or None."""
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "added projections of keys (added_kv_proj_dim)"
    queries = queries_of(module)
    if len(queries) > 1:
        return f"projects queries in {queries[0]} and {queries[1]}"
    children = [name for name, child in module.named_children() if _has_matrix(child)]
    added = [
        n
        for n in children
        if {"kv", "k"}.intersection(words(n)) and {"add", "added", "txt", "text", "context"}.intersection(words(n))
    ]
    return f"adds keys by {added[0]}" if added and queries else None


def _other_width(module: nn.Module) -> bool:
    """Whether keys are projected from another number of channels than queries."""
    if isinstance(module, nn.MultiheadAttention):
        return not module._qkv_same_embed_dim
    named = {name: getattr(child, "in_features", None) for name, child in module.named_children()}
    q = next((width for name, width in named.items() if {"q", "query", "wq"}.intersection(words(name)) and width), None)
    k = next(
        (width for name, width in named.items() if {"k", "kv", "key", "wk", "wkv"}.intersection(words(name)) and width),
        None,
    )
    return q is not None and k is not None and q != k


def _takes_keys(module: nn.Module, *, required: bool) -> bool:
    """Whether `forward` has an input, after its first, for a sequence that keys come from.

    `**kwargs` may be one where none is required.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    if not required and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return True
    return any(p.name in _ELSEWHERE and (not required or p.default is p.empty) for p in parameters)


def _called_with_other_keys(parent: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether attention takes queries and keys apart, and the source of the parent's `forward` gives it keys that are
    not the queries."""
    names = tuple(inspect.signature(module.forward).parameters)[:2]
    if names not in (("query", "key"), ("q", "k")):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(parent).forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"self.{name}":
            given: dict[Any, str] = dict(enumerate(map(ast.unparse, call.args))) | {
                k.arg: ast.unparse(k.value) for k in call.keywords
            }
            query, key = (given.get(word, given.get(place)) for place, word in enumerate(names))
            return query is not None and key is not None and query != key
    return False


def _only_one(parent: nn.Module) -> bool:
    return sum(bool(queries_of(m)) for m in parent.modules()) == 1


def axis(module: nn.Module, name: str, parents: Sequence[tuple[str, nn.Module]]) -> tuple[str, str]:
    """Whether self attention is "spatial" or "temporal", and why: the nearest name or class that says it decides, the
    model's own last.

    What says both is attention over space and time at once, which is spatial; so is what says nothing.

    Args:
        module: the attention.
        name: the last component of its path.
        parents: name and module of what is around it, the innermost first.
    """
    for depth, (component, holder) in enumerate([(name, module), *parents]):
        if not isinstance(holder, (*CONTAINERS, nn.Sequential)) and getattr(holder, "temporal", None) is True:
            return "temporal", f"temporal: {component or type(holder).__name__}.temporal is set"
        temporal = _TEMPORAL | (_TIME if depth == 0 else set())
        for said in (component, type(holder).__name__):
            spoken = set(words(said))
            if spoken & temporal or (
                any(motion <= spoken for motion in _MOTION) and not spoken & (_WHOLE | {"net", "model"})
            ):
                both = bool(spoken & _SPATIAL)
                return ("spatial", f"over space and time by {said}") if both else ("temporal", f"temporal by {said}")
            if spoken & _SPATIAL:
                return "spatial", f"spatial by {said}"
    return "spatial", "over all tokens"
