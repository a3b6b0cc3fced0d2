"""What an adapter neither trains nor saves, though a user would expect it: told of when it is injected."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..bases import is_quantized
from ..config import AdapterConfig, LoraConfig, matches
from ..errors import LoraWarning
from .copies import base_parameters
from .host import base_modules, unwrapped
from .kind import kind_of

NOTED = 0.01  # the share of a model's parameters from which it is told that "all-linear" leaves them out


def tell_fresh(root: nn.Module, config: AdapterConfig) -> None:
    """Warn of modules whose values are in no checkpoint, and which the adapter does not train."""
    fresh = [name for name in fresh_modules(root) if not matches(config.train, name)]
    if fresh:
        warnings.warn(
            f"train: {', '.join(fresh)} of {type(root).__name__} hold fresh values, which no checkpoint has, and the "
            f"adapter neither trains nor saves them; give train={[*config.train, *fresh]!r}",
            LoraWarning,
            stacklevel=3,
        )


def tell_stacked(root: nn.Module, config: LoraConfig, left_in: Callable[[str], bool]) -> None:
    """Warn of stacked matrices that "all-linear" passes by.

    `left_in`: whether `exclude`, `layers` and `train` leave a module of that name to `targets`.
    """
    share, kinds = _stacked(root, left_in) if config.targets == "all-linear" else (0.0, [])
    if share >= NOTED:
        warnings.warn(
            f"targets: 'all-linear' leaves out {', '.join(kinds)}, {100 * share:.0f} % of the parameters: their "
            "matrices are stacked in one parameter, which no kind of host takes, and stay frozen. Name the targets to "
            "silence this",
            LoraWarning,
            stacklevel=3,
        )


def fresh_modules(root: nn.Module) -> list[str]:
    """Full names of the outermost modules that `from_pretrained` made anew, or that were made since.

    transformers marks each parameter that it reads. `resize_token_embeddings` keeps the mark of one table and not of
    another, but the model inside still says what the length was.
    """
    marked = {n: getattr(p, "_is_hf_initialized", False) for n, p in base_parameters(root)}
    modules = dict(base_modules(root))
    if not any(marked.values()):
        return []  # made from a config: nothing is known
    loaded = {n: marked[n] or p.is_meta for n, p in base_parameters(root)}
    whole = {name for name, module in modules.items() if name and _is_fresh(name, module, loaded)}
    found = [name for name in whole if name.rpartition(".")[0] not in whole]
    before, after = (getattr(m, "vocab_size", None) for m in (getattr(root, "base_model", root), root))
    if isinstance(before, int) and isinstance(after, int) and before != after:
        model: Any = root
        ends = [
            unwrapped(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
        ]
        resized = [name for name, module in modules.items() if module in ends]
        found = [name for name in found if name not in resized] + (resized if before < after else [])
    return [name for name in modules if name in found]


def _is_fresh(name: str, module: nn.Module, loaded: dict[str, bool]) -> bool:
    """Whether all that a module holds was made anew; of a list of modules, each is asked on its own."""
    own = [n for n, p in base_parameters(module) if p.is_floating_point()]
    if isinstance(module, nn.ModuleList) or not own or any(is_quantized(inner) for _, inner in base_modules(module)):
        return False
    return not any(loaded.get(f"{name}.{n}", False) for n in own)


def _stacked(root: nn.Module, left_in: Callable[[str], bool]) -> tuple[float, list[str]]:
    """The share of the parameters that are stacked matrices of modules that no kind takes, and their classes."""
    sizes = {id(p): p.numel() for _, p in base_parameters(root)}
    stacks: dict[int, int] = {}
    classes: Counter[str] = Counter()
    for name, module in base_modules(root):
        if kind_of(module) is None and left_in(name):
            found = {id(p): p.numel() for p in _matrices(module)}
            classes[type(module).__name__] += bool(found)
            stacks |= found
    share = sum(stacks.values()) / max(1, sum(sizes.values()))
    return share, [f"{name} ({count} modules)" for name, count in classes.items() if count]


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that stack matrices, or are one in a module of experts; a convolution's are filters."""
    dims = 2 if "expert" in type(module).__name__.lower() else 3
    filters = hasattr(module, "kernel_size") or isinstance(module, ParametrizationList)
    for parameter in module._parameters.values() if not filters else ():
        if (
            parameter is not None
            and parameter.is_floating_point()
            and parameter.dim() >= dims
            and min(parameter.shape) > 1
        ):
            yield parameter
