"""Small models that bitsandbytes quantized on the CPU, and the dense models that they stand for.

Their widths are multiples of 64: bitsandbytes' own CPU product is wrong where a block runs over the end of a row.
"""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, tiny_llama
from lora.layers import hosts
from two_kinds import update64

bnb = pytest.importorskip("bitsandbytes")
KINDS = ["nf4", "fp4", "nested nf4", "int8"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.1}


@functools.cache
def folder(**changes: Any) -> tempfile.TemporaryDirectory[str]:
    """A tiny Llama in float32 on disk, once a session."""
    place = tempfile.TemporaryDirectory()
    tiny_llama(**{**SIZES, **changes}).save_pretrained(place.name)
    return place


def llama(kind: str | None, dtype: torch.dtype = torch.bfloat16, path: Path | None = None, **settings: Any) -> Any:
    """It as transformers loads it, quantized or (None) not, in training mode."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "int8":
        settings["load_in_8bit"] = True
    elif kind is not None:
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": kind[-3:], "bnb_4bit_use_double_quant": len(kind) > 3}
    config = BitsAndBytesConfig(**settings) if kind is not None else None
    return AutoModelForCausalLM.from_pretrained(path or folder().name, quantization_config=config, dtype=dtype).train()


def linear(kind: str, inputs: int, outputs: int, **settings: Any) -> nn.Module:
    """Not quantized yet."""
    if kind == "int8":
        return bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=6.0, **settings)
    return bnb.nn.Linear4bit(inputs, outputs, quant_type=kind[-3:], compress_statistics=len(kind) > 3, **settings)


def net(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Three linears, 64 -> 128 -> 128 -> 64, in training mode."""
    torch.manual_seed(0)
    linears = [linear(kind, 64, 128), linear(kind, 128, 128), linear(kind, 128, 64)]
    return nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2]).to(dtype).to("cpu").train()


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(1, 97, (rows, 11), generator=torch.Generator().manual_seed(3))


def inputs(dtype: torch.dtype = torch.bfloat16, rows: int = 9) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules() if ".lora" not in name}


def adapted(kind: str | None, dtype: torch.dtype = torch.bfloat16, ratio: float = 0.1, **settings: Any) -> Any:
    """Each update has `ratio` of its weight's norm."""
    model = lora.inject(llama(kind, dtype), **{"r": 4, "targets": TARGETS, **settings})
    return scaled(randomize(model), ratio)


def scaled(model: nn.Module, ratio: float) -> nn.Module:
    for _, host, adapters in hosts(model):
        part, weight = adapters["default"], adapters.frozen.dense(torch.float64)
        part.B.data *= ratio * weight.norm() / update64(host).norm()
    return model


def values(module: Any) -> Tensor:
    """What a quantized linear's weight stands for, (out, in) fp32, by bitsandbytes' own words."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return module.weight.data.float() * (scales * (1 / 127))[:, None]
    state = copy.copy(module.weight.quant_state)
    state.dtype = torch.float32
    dense: Tensor = bnb.functional.dequantize_4bit(module.weight.data, state)
    return dense


def dense_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy without adapters, on plain linears of the dequantized weights."""
    twin: Any = copy.deepcopy(model)
    if any(".lora." in name for name, _ in twin.named_modules()):
        lora.remove(twin)
    for name, module in list(twin.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
            plain.weight.data = values(module).to(dtype)
            if module.bias is not None:
                plain.bias.data = module.bias.data.to(dtype)
            twin.set_submodule(name, plain)
    for attribute in ("hf_quantizer", "quantization_method"):
        twin.__dict__.pop(attribute, None)
    twin.__dict__.update({"is_quantized": False} if "is_quantized" in twin.__dict__ else {})
    return twin.to(dtype)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapted_twin(model: nn.Module, dtype: torch.dtype, **settings: Any) -> nn.Module:
    """`dense_twin` with an adapter of the same settings and values."""
    twin = lora.inject(dense_twin(model, dtype), **settings)
    own = trained(model)
    for name, parameter in trained(twin).items():
        parameter.data = own[name].data.to(parameter.dtype).clone()
    return twin


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Of a fixed weighing of the outputs, by the parameter's name."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    (out.double() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    missed = sum((found[n].double() - exact[n].double()).square().sum().item() for n in exact)
    return (missed / sum(exact[n].double().square().sum().item() for n in exact)) ** 0.5
