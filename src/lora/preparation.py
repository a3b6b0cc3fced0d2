"""prepare, param_groups: what a large or quantized model needs before it is trained, and what its optimizer does."""

import math
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .atomic import alone, whole_or_not
from .bases import is_quantized, weight_of
from .errors import LoraError
from .layers import hosts
from .layers.frozen import model_dtype
from .layers.host import base_modules, submodule
from .ops.offload import Offload
from .resident import is_merged, unwrap
from .targets import output_heads
from .updates import Update

ModelT = TypeVar("ModelT", bound=nn.Module)


def prepare(
    model: ModelT, *, checkpointing: bool | Literal["offload"] = True, norms_fp32: bool = False,
    head_dtype: torch.dtype | None = None,
) -> ModelT:  # fmt: skip
    """Make a model, quantized or not, ready for training within little memory, in place; before or after `inject`.

    `lora.summary` tells what is in force.

    Args:
        checkpointing: recompute each layer in the backward pass (True); keep the layers' inputs in pinned host memory
            as well ("offload", on a GPU); or neither (False: what the model does now stays).
        norms_fp32: hold the normalization weights in float32. They are not trained, so it only helps a model that
            overflows in float16.
        head_dtype: of the output head, whose input is cast to it; None leaves the head as it is.

    Returns:
        The same model.

    Raises:
        LoraError: a weight that is not quantized yet, checkpointing that the model does not know, "offload" without a
            GPU, a tied head. The model is then as it was.
    """
    root = unwrap(model)
    if checkpointing not in (True, False, "offload"):
        raise LoraError(f"checkpointing: got {checkpointing!r}; allowed are True, False and 'offload'")
    with alone():
        heads = _heads(root, head_dtype) if head_dtype is not None else []
        for _, module in base_modules(root):
            weight = weight_of(module)
            if weight is not None and weight.quantization is not None:
                weight.check()
        cast = [inner for module in (*_norms(root), *heads) for inner in module.modules()]  # also copies that are idle
        whole_or_not(root, lambda _: _prepare(root, checkpointing, norms_fp32, heads, head_dtype), beside=cast)
    return model


def _prepare(
    root: nn.Module, checkpointing: bool | str, norms_fp32: bool, heads: list[nn.Module],
    head_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    if checkpointing:
        _checkpoint(root, checkpointing == "offload")
    for module in _norms(root) if norms_fp32 else []:
        dtype = _dtype(module)
        if dtype != torch.float32:
            _cast(module, torch.float32)
            module.register_forward_hook(partial(_cast_output, dtype))
    for head in heads:
        assert head_dtype is not None
        _cast(head, head_dtype)


def _cast_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A hook that casts a module's input to its weight's dtype."""
    dtype = _dtype(module)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook that casts a module's output back to the dtype that it had, which the layers after it compute in."""
    return output.to(dtype)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold a module in another dtype, but not A and B, and give it its input in that."""
    for inner in module.modules():
        if not isinstance(inner, Update):
            for tensor in (*inner._parameters.values(), *inner._buffers.values()):
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    if _cast_input not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_cast_input, with_kwargs=True)


def param_groups(
    model: nn.Module, lr: float, *, lora_plus: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What trains, in groups for an optimizer: `AdamW(lora.param_groups(model, lr=1e-4, lora_plus=16))`.

    LoRA+ (Hayou et al., 2024, arXiv:2402.12354): B learns at a multiple of A's rate, since an element of A x sums over
    the input's features and one of B h over the rank. The A of an embedding is looked up and sums nothing, so both its
    halves keep one rate, as everything else that trains does.

    Args:
        lr: the rate of A and of all that is no B.
        lora_plus: the rate of B, as a multiple of lr; 1 is LoRA.
        weight_decay: of matrices and tables; biases, gains, gates and other vectors have none.

    Returns:
        Groups with "name" ("A", "B", "matrices", "vectors"), "params", "lr" and "weight_decay", those alone that hold
        something. Each parameter with `requires_grad` is in one of them, once; those of adapters that are idle too.

    Raises:
        LoraError: a number that is none of these, or nothing trains.
    """
    for label, value, least in (("lr", lr, 0), ("lora_plus", lora_plus, 0), ("weight_decay", weight_decay, -1)):
        sound = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not sound or not (value > least and value >= 0):
            raise LoraError(f"{label}: got {value!r}; a finite number {'of at least' if least else 'above'} 0")
    root = unwrap(model)
    halves: dict[int, str] = {}
    for _, _, adapters in hosts(root):
        for name in adapters.records if adapters.halved else ():
            halves |= {id(tensor): half for half, tensor in adapters[name].tensors().items() if half in ("A", "B")}
    found: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "matrices": [], "vectors": []}
    for parameter in root.parameters():
        if parameter.requires_grad:
            plain = "matrices" if sum(size > 1 for size in parameter.shape) > 1 else "vectors"
            found[halves.get(id(parameter), plain)].append(parameter)
    if not any(found.values()):
        raise LoraError("model: none of its parameters trains; lora.inject it, or lora.load(..., trainable=True)")
    return [
        {"name": name, "params": parameters, "lr": lr * (lora_plus if name == "B" else 1),
         "weight_decay": 0.0 if name == "vectors" else weight_decay}
        for name, parameters in found.items() if parameters
    ]  # fmt: skip


def prepared(root: nn.Module) -> str:
    """What of `prepare` is in force, in words; "" for nothing."""
    parts = []
    functions = _checkpointers(root)
    if functions:
        offloads = any(isinstance(function, Offload) for function in functions)
        parts.append("checkpointing" + (" with its inputs in host memory" if offloads else ""))
    plain = model_dtype(root)
    norms = {p.dtype for m in _norms(root) for p in m._parameters.values() if p is not None}
    if norms == {torch.float32} and plain not in (None, torch.float32):
        parts.append("norms in float32")
    for name in output_heads(root):
        head = submodule(root, name)
        if _cast_input in head._forward_pre_hooks.values():
            parts.append(f"{name} in {str(_dtype(head))[6:]}")
    return ", ".join(parts)


def _checkpoint(root: nn.Module, offload: bool) -> None:
    # The method has another name in older transformers 5.
    enable: Any = getattr(root, "activation_checkpointing_enable", getattr(root, "gradient_checkpointing_enable", None))
    if enable is None or not getattr(root, "supports_gradient_checkpointing", True):
        raise LoraError(
            f"checkpointing: {type(root).__name__} does not know it; pass checkpointing=False, or wrap its layers in "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    if offload and not any(p.is_cuda for p in root.parameters()):
        raise LoraError("checkpointing: 'offload' moves inputs from a GPU to host memory, and no parameter is on one")
    before = _checkpointers(root)
    # The reentrant kind would need an input with a gradient, and runs every layer's hooks twice.
    replaced = [f for f in before if isinstance(f, Offload) or getattr(f, "keywords", {}).get("use_reentrant", False)]
    if not before or offload or replaced:
        enable({"use_reentrant": False})
    if offload:
        function = Offload()
        for _, module in base_modules(root):
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = function  # type: ignore[assignment]


def _checkpointers(root: nn.Module) -> list[Any]:
    """What recomputes, of each module that has it do so."""
    on = [m for _, m in base_modules(root) if getattr(m, "gradient_checkpointing", False) is True]
    return [getattr(module, "_gradient_checkpointing_func", None) for module in on]


def _norms(root: nn.Module) -> list[nn.Module]:
    return [m for _, m in base_modules(root) if "Norm" in type(m).__name__ and m._parameters]


def _heads(root: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoraError(f"head_dtype: got {dtype!r}; a floating-point torch.dtype is expected, such as torch.float32")
    if is_merged(root):
        raise LoraError("head_dtype: the model is merged, and unmerge needs its weights as they are; call it before")
    heads = {name: submodule(root, name) for name in output_heads(root)}
    if not heads:
        raise LoraError(f"head_dtype: {type(root).__name__} has no output head under a known name; leave it None")
    for name, head in heads.items():
        if any(is_quantized(module) for _, module in base_modules(head)):
            raise LoraError(f"head_dtype: {name!r} is quantized; leave it None")
        for other, module in base_modules(root):
            shared = [p for p in module._parameters.values() if p is not None and p is head._parameters.get("weight")]
            if shared and module is not head and head.weight.dtype != dtype:
                raise LoraError(f"head_dtype: {name!r} is tied to {other!r}, which would be cast too; leave it None")
    return list(heads.values())
