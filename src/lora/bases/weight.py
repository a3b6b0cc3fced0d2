# ruff: noqa: B027
# Most formats need nothing of what a model is told, so that those methods are empty and not abstract.
"""The frozen weight W0 of a layer, however it is stored: what each format answers, and the table of the formats.

A new format is one file, here or in another package: a `FrozenWeight` that is registered and, where its storage is
packed, a registered `ops.dequantize.Layout`. Nothing else in the library names a format.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import listed
from ..ops.dequantize import layout
from .offloaded import running_device

# The tensors that store a weight, and how: `str(ops.dequantize.Layout)`, or "" for a plain matrix.
Stored = tuple[list[Tensor], str]


class FrozenWeight(ABC):
    """W0 of a module that computes `W0 x (+ bias)`, seen as an (out, in) matrix.

    The module has `bias` among its parameters, if only as None. Making a `FrozenWeight` is cheap: a quantized linear
    without an adapter makes one at each call.
    """

    role: ClassVar[str] = "linear"  # what the module computes with it: the kind of host that may adapt it
    package: ClassVar[str]  # from which these classes come; told by name, so that nothing has to be imported
    classes: ClassVar[tuple[str, ...]]
    transposed: ClassVar[bool] = False  # stored as (in, out), which PEFT's files tell of
    quantization: str | None = None  # a short name such as "nf4"; None for a plain matrix
    note: ClassVar[str | None] = None  # what a summary says of a model with such weights

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    def plain_class(cls, module_class: type[nn.Module]) -> type[nn.Module] | None:
        """The class of the package that a module's class is or comes from; None: this format is not for it.

        A module whose class has another `forward` computes something else, and is left alone.
        """
        within, bases = f"{cls.package}.", module_class.__mro__
        return next((c for c in bases if c.__qualname__ in cls.classes and f"{c.__module__}.".startswith(within)), None)

    @property
    def parameter(self) -> Tensor:
        """The parameter that stores it, in its own layout."""
        return self.module._parameters["weight"]  # type: ignore[no-any-return]  # quicker than `.weight`, each step

    @property
    def device(self) -> torch.device:
        """Where the module computes with it, which is where an adapter's part belongs."""
        return running_device(self.module, self.parameter)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What `dense()` gives where it is not told."""

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the module computes with for an input x, which is not x's own where a quantizer says so."""
        return x.dtype

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the module's output for an input x."""
        return x.dtype

    @abstractmethod
    def stored(self) -> Stored:
        """What the fused operator takes."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, (out, in); a view where the storage allows one."""

    @abstractmethod
    def at(self, row: int, column: int) -> Tensor:
        """One element, 0-dim; in fp32 where it is dequantized."""

    def write_(self, rows: slice, values: Tensor) -> None:
        """Put `values` (n, in) in place of some rows, in the storage's dtype. A quantized weight has no such way."""
        raise NotImplementedError

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the parameter's own layout; a view where it can be."""
        return matrix

    @property
    def label(self) -> str | None:
        """The quantization in an adapter's file, by all that the weight's values depend on."""
        return self.quantization

    def check(self) -> None:
        """Raises `LoraError` where the weight cannot be used as it is, such as one that is not quantized yet."""

    def runs_own_forward(self, host: nn.Module, x: Tensor) -> bool:
        """Whether the product with x is left to the forward of the host's own class."""
        return False

    def own_forward(self, host: nn.Module, original: type[nn.Module], x: Tensor) -> Tensor:
        """That product; `original`: the host's class without adapters."""
        return original.forward(host, x)  # type: ignore[no-any-return]

    # What a model with such weights needs of others: for every registered format, whether the model has one or not.

    @classmethod
    def allow_training(cls, root: nn.Module, allowed: bool) -> None:
        """The model carries adapters from now on, so that others may train it, or no longer; told with each adapter."""

    @classmethod
    def forget(cls, root: nn.Module, names: Iterable[str]) -> None:
        """These modules hold plain weights from now on; the model's config has to say so."""

    @classmethod
    def touches(cls, root: nn.Module) -> list[Any]:
        """What is no module and is changed by the two above: an interrupted verb gives it its class and attributes
        back."""
        return []

    # For transformers' `from_pretrained`.

    loads: ClassVar[tuple[str, ...]] = ()  # the quantizations that it can be told to make

    @classmethod
    def load_settings(cls, name: str, dtype: torch.dtype | str, skip: Sequence[str] = ()) -> Any:
        """`quantization_config` for one of `loads`; dtype: of the products with the weights; skip: modules left out."""
        raise NotImplementedError

    @classmethod
    def planned(cls, name: str, shape: tuple[int, int], settings: dict[str, Any] | None = None) -> str:
        """The `ops.dequantize.Layout`, as text, that one of `loads` gives a weight (out, in); or, where a saved model's
        `quantization_config` is given, that has."""
        raise NotImplementedError

    @classmethod
    def sample(cls, name: str, inputs: int, outputs: int) -> nn.Module:
        """A linear of random values that becomes one of `loads` when it moves to a device."""
        raise NotImplementedError

    @classmethod
    def saved_as(cls, settings: dict[str, Any]) -> str | None:
        """The quantization that a saved model's `quantization_config` tells of; None: another format's."""
        return None

    @classmethod
    def require(cls, why: str) -> None:
        """Raises `LoraError`, which starts with `why`, where a package that the format needs is not there."""

    @classmethod
    def after_loading(cls, model: nn.Module) -> None:
        """Put right what transformers leaves on a model that was saved in this format."""


class Quantized(FrozenWeight):
    """A weight that is frozen for good, dequantized when it is used, and replaced as a whole by a merge."""

    into: ClassVar[tuple[str, ...]] = ()  # the quantizations that `quantized` makes: what a merge may be told to

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ops.lora.dequantize(*self.stored(), dtype or self.dtype)  # type: ignore[no-any-return]

    def at(self, row: int, column: int) -> Tensor:
        parts, form = self.stored()
        return layout(form).element(parts, row, column)

    def check(self) -> None:
        self.stored()

    def attributes(self) -> dict[str, Any]:
        """The module's attributes that belong to the parameter, as they are now."""
        return {}

    def quantized(self, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """A parameter like the present one, and its attributes, of other values (out, in) fp32."""
        raise NotImplementedError

    def install(self, parameter: Any, attributes: dict[str, Any]) -> None:
        """Give the module a parameter and its attributes, on the device where it is now.

        A plain parameter (out, in) comes without attributes: the module's class is nn.Linear while it has that.
        """
        device = self.parameter.device
        self.module._parameters["weight"] = parameter if parameter.device == device else parameter.to(device)
        for name, value in attributes.items():
            setattr(self.module, name, value)

    def why_not_plain(self) -> str | None:
        """Why no nn.Linear may stand in the module's place, in words that follow its name; None: it may."""
        return None


KindT = TypeVar("KindT", bound=type[FrozenWeight])
_KINDS: list[type[FrozenWeight]] = []


def register(kind: KindT) -> KindT:
    """Put a format into the table; a decorator. The last one registered is asked first."""
    _KINDS.append(kind)
    return kind


def unregister(kind: type[FrozenWeight]) -> None:
    _KINDS.remove(kind)


def weight_kind(module_class: type[nn.Module], role: str = "linear") -> type[FrozenWeight] | None:
    """The format of the modules of a class, or None where no format of this role takes it."""
    return next((kind for kind in reversed(_KINDS) if kind.role == role and kind.plain_class(module_class)), None)


def weight_of(module: nn.Module, role: str = "linear") -> FrozenWeight | None:
    """The frozen weight of a module that computes `W0 x (+ bias)`, or None where the library knows no such."""
    kind = weight_kind(type(module), role)
    return None if kind is None else kind(module)


def is_quantized(module: nn.Module) -> bool:
    weight = weight_of(module)
    return weight is not None and weight.quantization is not None


def keeps_forward(module_class: type[nn.Module], role: str = "linear") -> bool:
    """Whether modules of this class compute their weight's product: the class has no forward of its own."""
    kind = weight_kind(module_class, role)
    plain = None if kind is None else kind.plain_class(module_class)
    return plain is not None and module_class.forward is plain.forward


def supported() -> str:
    """The classes that the formats take, in words."""
    by_package: dict[str, list[str]] = {}
    for kind in _KINDS:
        by_package.setdefault(kind.package.partition(".")[0], []).extend(kind.classes)
    owners = [f"nn.{name}" for name in by_package.pop("torch", [])]
    owners += [f"{package}' {listed(names)}" for package, names in by_package.items()]
    return f"supported are {listed(owners)}"


# What a whole model, and who trains, saves or loads it, is told.


def allow_training(root: nn.Module, allowed: bool) -> None:
    """Let others, such as transformers' Trainer, train a quantized model that carries adapters, or no longer."""
    for kind in _KINDS:
        kind.allow_training(root, allowed)


def forget_quantization(root: nn.Module, names: list[str]) -> None:
    """Make a model's config say which modules are no longer quantized, so that it is saved as it is."""
    for kind in _KINDS:
        kind.forget(root, names)


def touched(root: nn.Module) -> list[Any]:
    """What these two change of a model beside its modules."""
    return [thing for kind in _KINDS for thing in kind.touches(root)]


def into_names() -> list[str]:
    """The quantizations that a merge may be told to quantize its sum in again."""
    return [name for kind in _KINDS if issubclass(kind, Quantized) for name in kind.into]


def loadable() -> dict[str, type[FrozenWeight]]:
    """The quantizations that a model can be loaded in, and their formats."""
    return {name: kind for kind in _KINDS for name in kind.loads}


def saved_as(settings: dict[str, Any]) -> tuple[str, type[FrozenWeight] | None]:
    """The quantization that a saved model's `quantization_config` tells of, and its format, if one knows it."""
    for kind in reversed(_KINDS):
        name = kind.saved_as(settings)
        if name is not None:
            return name, kind
    return str(settings.get("quant_method", "an unknown quantization")), None
