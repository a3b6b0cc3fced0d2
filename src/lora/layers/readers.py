"""Modules whose parent reads their weight and never calls them: an update there would do nothing.

Told from the source of the classes around a module, before anything runs: dt_proj of a state-space model, the
projections of nn.MultiheadAttention. Where the source leaves it open nothing is said; training tells (`unreached.py`).
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..errors import LoraError
from .host import original_class, submodule

HARMLESS = ("weight", "bias", "in_features", "out_features", "num_embeddings", "embedding_dim")
ENUMERATES = ("children", "named_children", "modules", "named_modules", "get_submodule", "_modules", "__dict__")
ASKS = ("hasattr", "isinstance", "super", "type", "id")  # these call no child of `self`


def never_called(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether the parent of a module reads its weight, and nobody around it calls it or hands it on.

    Args:
        modules: the model's modules, under each of their full names.
    """
    if not _only_read(modules, name):
        return False
    return all(_only_read(modules, other) for other, module in modules.items() if module is modules[name])


def check_fast_path(model: nn.Module, name: str) -> None:
    """Refuse a target that torch's fast path for inference reads and passes by."""
    parent = submodule(model, name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise LoraError(
            f"targets: {name!r} is inside nn.TransformerEncoderLayer, whose fast path reads its weight and does not "
            "call it in eval mode; call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _only_read(modules: dict[str, nn.Module], name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    parent = modules[path]
    kind: Any = original_class(parent)
    if not any("weight" in _looked_up(function.__code__) for function in _naming_of(kind, leaf)):
        return False
    if kind.forward is nn.Module.forward or ("forward" in parent.__dict__ and "_old_forward" not in parent.__dict__):
        return False  # it is a container, whose children others call, or somebody replaced its forward
    if {use for function in _methods(kind) for use in _uses(function, parent, leaf)} != {"read"}:
        return False
    around = [modules[path[:end]] for end in range(len(path)) if path[end] == "." or not end]  # from the root down
    outer = {use for m in around for function in _naming(m, leaf) for use in _uses(function, m, leaf)}
    return not outer & {"used", "unknown"}


def _naming(module: nn.Module, leaf: str) -> list[FunctionType]:
    kind: Any = original_class(module)
    return _naming_of(kind, leaf)


@cache
def _naming_of(kind: type, leaf: str) -> list[FunctionType]:
    """What of a class and its bases looks up an attribute of this name."""
    return [function for function in _methods(kind) if leaf in _looked_up(function.__code__)]


@cache
def _methods(kind: type) -> list[FunctionType]:
    """The functions of a class and its bases, also those behind properties and decorators."""
    found = []
    for base in kind.__mro__:
        for value in vars(base).values() if issubclass(base, nn.Module) and base is not nn.Module else ():
            inner = next((v for name in ("fget", "func", "__func__") if (v := getattr(value, name, None))), value)
            function = inspect.unwrap(inner) if callable(inner) else None
            if isinstance(function, FunctionType):
                found.append(function)
    return found


@cache
def _looked_up(code: CodeType) -> frozenset[str]:
    """The attributes and globals that a function names: quicker to have than its source."""
    return frozenset(code.co_names).union(*(_looked_up(c) for c in code.co_consts if isinstance(c, CodeType)))


def _uses(function: FunctionType, module: nn.Module, leaf: str) -> Iterator[str]:
    """What a method of this module does with `leaf`: "read" its weight, "used" otherwise, or "unknown"."""
    tree = _parsed(function)
    if tree is None:
        yield "unknown"
        return
    starts = "init" in function.__name__ or "reset" in function.__name__
    for node, around in _nodes(tree, module):
        match node, around:
            case ast.Attribute(attr=attr, ctx=ast.Load()), _ if attr == leaf:
                if not (isinstance(around, ast.Attribute) and around.attr in HARMLESS):
                    yield "used"
                elif around.attr == "weight" and ast.unparse(node.value) == "self" and not starts:
                    yield "read"
            case ast.Name(id="self"), _ if not _asks(around):
                yield "handed on"
            case ast.Attribute(value=ast.Name(id="self"), attr=attr), _ if attr in ENUMERATES:
                yield "handed on"


def _asks(around: ast.AST) -> bool:
    """Whether what stands around `self` takes no more of it than an attribute or an answer."""
    return isinstance(around, ast.Attribute) or (isinstance(around, ast.Call) and ast.unparse(around.func) in ASKS)


@cache
def _parsed(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _nodes(tree: Any, module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """(node, the node around it), without the branches that `hasattr(self..., "...")` rules out for this module."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, (ast.If, ast.IfExp)) and child is not tree.test:
            holds = _holds(tree.test, module)
            if holds is not None and holds != (child is tree.body or child in _list(tree.body)):
                continue
        yield child, tree
        yield from _nodes(child, module)


def _list(body: Any) -> list[Any]:
    return body if isinstance(body, list) else []


def _holds(test: ast.AST, module: nn.Module) -> bool | None:
    """Whether `hasattr(self.config, "...")` holds; None for any other test."""
    match test:
        case ast.Call(func=ast.Name(id="hasattr"), args=[owner, ast.Constant(value=str(name))]):
            if re.fullmatch(r"self(\.\w+)*", path := ast.unparse(owner)):
                found: Any = module
                for part in path.split(".")[1:]:
                    found = getattr(found, part, None)
                return hasattr(found, name)
    return None
