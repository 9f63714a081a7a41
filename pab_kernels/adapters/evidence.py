"""Classifying the modules of a DiT by their contents and names, each result with its reason.

Names are compared word by word (`attn_temp` has the words attn and temp); a part of a word never matches.
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
"""Classes that only hold modules and are never called."""

_QUERIES = {"q", "qk", "qkv", "query", "queries", "wq", "wqkv"}
_ATTENTION = {"attn", "attention", "mha", "msa"}
_MLP = {"mlp", "ff", "ffn", "feedforward", "moe"}
_NEITHER = {
    *("norm", "mod", "modulation", "adaln", "ada", "gate", "embed", "embedder", "embedding", "emb", "rope"),
    *("bias", "mask", "processor", "scale", "shift", "table", "time", "timestep"),
}
"""Words of modules that belong to an attention or MLP without being one."""
_WHOLE = {"block", "layer"}
"""Words of classes that contain an attention or MLP and its residual addition, so are no sublayer by name."""
_ASIDE = {
    *("refiner", "refine", "embed", "embedder", "embedders", "embedding", "embeddings", "emb", "pool", "pooler"),
    *("pooling", "perceiver", "resampler", "connector", "extractor", "text", "txt", "caption", "cap"),
}
"""Words of modules that prepare the text or the latents before the blocks, which are left alone."""
_TEMPORAL = {"temporal", "temp", "tempo"}
_TIME = {"time", "frame", "frames"}
_MOTION = ({"motion"}, {"animate", "diff"})
"""Sets of words, one of which must be complete in the name of a module that attends over frames.

They do not count in the class of a block or model, which contains such modules among others.
"""
_SPATIAL = {"spatial", "spatio", "space"}
_CROSS = {"cross", "crossattn", "crossattention"}
_ELSEWHERE = {"encoder_hidden_states", "context", "cond", "text", "memory", "y", "kv", "key_value"}


def words(name: str) -> list[str]:
    """The words of a name in lower case: `CrossAttention2D` and `cross_attention_2d` are cross, attention, 2, d."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def set_aside(path: Sequence[str]) -> str | None:
    """The component of a path which shows that a module prepares text or latents before the blocks, or None.

    In the last component only the words of refiners and poolers count, as attention in a block may be named after the
    stream that it reads.
    """
    for component in path[:-1]:
        if _ASIDE.intersection(words(component)):
            return component
    prepares = {"refiner", "pool", "pooler", "pooling", "perceiver", "resampler"}.intersection(words(path[-1]))
    return path[-1] if prepares else None


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _matrices(module: nn.Module) -> int:
    """The number of modules in `module`, itself included, with a weight of two or more dimensions."""
    return sum(any(p.ndim >= 2 for p in m.parameters(recurse=False)) for m in module.modules())


def queries_of(module: nn.Module) -> list[str]:
    """Names of the query projections that are children or parameters of a module."""
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj"]
    children = [
        name for name, child in module.named_children() if _QUERIES.intersection(words(name)) and _has_matrix(child)
    ]
    return children + [
        n for n, p in module.named_parameters(recurse=False) if p.ndim >= 2 and _QUERIES.intersection(words(n))
    ]


def attention_by(module: nn.Module, name: str) -> str | None:
    """Why a module is attention, or None: it projects queries, or has attention in its name and children with weights.

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
    for what, label in (("class", type(module).__name__), ("name", name)):
        found_words = words(label)
        if _ATTENTION.intersection(found_words) and not (_NEITHER | _WHOLE).intersection(found_words):
            return f"attention by its {what} {label}"
    return None


def mlp_by(module: nn.Module, name: str) -> str | None:
    """Why a module is an MLP, or None: it has two weights and such a name, or is a chain of layers that widens.

    Args:
        module: any module.
        name: the last component of its path.
    """
    if isinstance(module, CONTAINERS) or _matrices(module) < 2 or _NEITHER.intersection(words(name)):
        return None
    for what, label in (("name", name), ("class", type(module).__name__)):
        found_words = words(label)
        if what == "class" and _WHOLE.intersection(found_words):
            continue
        if _MLP.intersection(found_words) or ("feed", "forward") in zip(found_words, found_words[1:], strict=False):
            return f"MLP by its {what} {label}"
    if isinstance(module, nn.Sequential):
        linears = [m for m in module if isinstance(m, nn.Linear)]
        if len(linears) > 1 and linears[0].in_features == linears[-1].out_features < linears[0].out_features:
            return "MLP: a chain of linear layers that widens and returns to its width"
    return None


def keys_from_elsewhere(module: nn.Module, name: str, parents: Sequence[tuple[str, nn.Module]]) -> tuple[bool, str]:
    """Whether attention takes its keys only from another sequence (cross attention), and why.

    Joint attention, which projects queries for both sequences or adds keys of the other one to its own, is not cross
    attention.

    Args:
        module: the attention.
        name: the last component of its path.
        parents: names and modules around it, innermost first.
    """
    of_name, of_class = words(name), words(type(module).__name__)
    if _CROSS.intersection(of_name):
        return True, f"cross attention by its name {name}"
    if _CROSS.intersection(of_class):
        return True, f"cross attention by its class {type(module).__name__}"
    declared = getattr(module, "is_cross_attention", None)
    joint = _joint(module)
    if "self" not in of_name and declared is True:
        return True, "keys from elsewhere (is_cross_attention)"
    if joint:
        return False, f"joint: {joint}"
    if "self" in of_name or "self" in of_class:
        return False, "self attention by its name"
    if _other_width(module):
        return True, "keys from elsewhere: they are projected from another width"
    if "to" in of_name[1:-1] and _ATTENTION.intersection(of_name):
        return True, f"cross attention by its name {name}"
    if declared is None and of_name[-2:] == ["attn", "2"] and _takes_keys(module, required=False):
        return True, "keys from elsewhere: attn2, with an input for them"
    if declared is None and _takes_keys(module, required=True):
        return True, "keys from elsewhere: its forward needs another sequence"
    if parents and _called_with_other_keys(parents[0][1], name, module):
        return True, "keys from elsewhere: it is called with other keys than queries"
    if parents and _CROSS.intersection(words(type(parents[0][1]).__name__)) and _only_one(parents[0][1]):
        return True, f"cross attention by the class around it, {type(parents[0][1]).__name__}"
    return False, "own keys"


def _joint(module: nn.Module) -> str | None:
    """Why attention is over two sequences at once, or None."""
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
    """Whether keys and queries are projected from different numbers of channels."""
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
    """Whether `forward` has an input after its first for the sequence of the keys.

    Args:
        module: the attention.
        required: whether that input has no default; if False, `**kwargs` counts too.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    if not required and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return True
    return any(p.name in _ELSEWHERE and (not required or p.default is p.empty) for p in parameters)


def _called_with_other_keys(parent: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether attention has separate inputs for queries and keys, and its parent's source passes different ones."""
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
    """Whether self attention is "spatial" or "temporal", and why.

    The nearest name or class with a word for either decides, from the module outwards to the model. A name with both is
    attention over space and time at once, which is spatial; so is attention without such a name.

    Args:
        module: the attention.
        name: the last component of its path.
        parents: names and modules around it, innermost first.
    """
    for depth, (component, holder) in enumerate([(name, module), *parents]):
        if not isinstance(holder, (*CONTAINERS, nn.Sequential)) and getattr(holder, "temporal", None) is True:
            return "temporal", f"temporal: {component or type(holder).__name__}.temporal is set"
        temporal = _TEMPORAL | (_TIME if depth == 0 else set())
        for label in (component, type(holder).__name__):
            found = set(words(label))
            if found & temporal or (
                any(motion <= found for motion in _MOTION) and not found & (_WHOLE | {"net", "model"})
            ):
                both = bool(found & _SPATIAL)
                return ("spatial", f"over space and time by {label}") if both else ("temporal", f"temporal by {label}")
            if found & _SPATIAL:
                return "spatial", f"spatial by {label}"
    return "spatial", "over all tokens"
