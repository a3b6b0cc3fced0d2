"""Quantized modules that carry no adapter: what is refused in words, and what is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from quantized_base import bnb, classes, inputs, linear, llama


class Odd(bnb.nn.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("make", [lambda: Odd(64, 64), lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True)])
def test_a_quantized_linear_that_is_no_frozen_product_is_left_alone(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(64, 64)).to("cpu").train()
    before, x = type(model[0]), inputs(torch.float32)
    out = model(x)
    lora.inject(model, r=4, targets=["1"])
    assert type(model[0]) is before
    assert torch.equal(model(x), out)


def foreign(package: str) -> nn.Module:
    """A module as another quantizer makes it: its own class, or a plain linear whose weight is a subclass."""
    if package.startswith("torchao"):
        module = nn.Linear(64, 64)
        kind = type("AffineQuantizedTensor", (nn.Parameter,), {"__module__": package})
        module._parameters["weight"] = torch.Tensor._make_subclass(kind, torch.zeros(64, 64))
        return module
    made: nn.Module = type("QuantLinear", (nn.Module,), {"__module__": package})()
    return made


FOREIGN = {
    "gptqmodel.nn_modules.qlinear": "GPTQ",
    "awq.modules.linear": "AWQ",
    "hqq.core.quantize": "HQQ",
    "torchao.dtypes.affine_quantized_tensor": "torchao",
}


@pytest.mark.parametrize("package", list(FOREIGN))
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", None, ".*_proj"], ids=str)
def test_other_quantizers_are_refused_by_name(package: str, targets: Any) -> None:
    model = nn.Module()
    model.q_proj, model.v_proj, model.lm_head = foreign(package), foreign(package), nn.Linear(64, 64)
    with pytest.raises(lora.LoraError) as caught:
        lora.inject(model, r=4, targets=targets)
    text = str(caught.value)
    assert f"quantized by {FOREIGN[package]}, which is not supported" in text
    assert "load_in_4bit=True" in text and "16 bits" in text
    if targets == ["q_proj"]:
        assert "Linear4bit and Linear8bitLt" in text


@pytest.mark.filterwarnings("ignore:targets. None picked")
@pytest.mark.parametrize("package", list(FOREIGN))
@pytest.mark.parametrize("targets", ["all-linear", None, ".*_proj"], ids=str)
def test_other_quantizers_are_not_skipped_beside_plain_linears(package: str, targets: Any) -> None:
    model = nn.Module()
    model.text, model.vision = nn.Module(), nn.Module()
    model.text.q_proj, model.text.v_proj = foreign(package), foreign(package)
    model.vision.q_proj, model.vision.v_proj = nn.Linear(64, 64), nn.Linear(64, 64)
    with pytest.raises(lora.LoraError, match=f"text.q_proj'.*quantized by {FOREIGN[package]}.*not supported"):
        lora.inject(model, r=4, targets=targets)
    lora.inject(model, r=4, targets=targets, exclude=["text.q_proj", "text.v_proj"])
    assert {row.target for row in lora.summary(model).rows} == {"vision.q_proj", "vision.v_proj"}


def meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(linear(kind, 64, 64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(linear("nf4", 64, 64)), r"Linear4bit is not quantized yet.*model.to\(device\)"),
        (lambda: nn.Sequential(linear("int8", 64, 64)), r"float32 and not quantized yet.*model.to\(device\)"),
        (lambda: meta("nf4"), r"not quantized yet.*model.to\(device\)"),
        (lambda: meta("int8"), r"not quantized yet.*model.to\(device\)"),
        (
            lambda: nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True)).to("cpu"),
            "has_fp16_weights=True.*not supported.*has_fp16_weights=False",
        ),
        (lambda: nn.Sequential(Odd(64, 64)).to("cpu"), "a forward of its own"),
    ],
    ids=["4 bit", "int8", "4 bit on meta", "int8 on meta", "fp16 weights", "own forward"],
)
def test_what_is_not_quantized_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = classes(model)
    with pytest.raises(lora.LoraError, match=message):
        lora.inject(model, r=4, targets=["0"])
    assert classes(model) == before


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_quantized_module_is_not_trained_whole(storage: torch.dtype) -> None:
    model = llama("nf4", bnb_4bit_quant_storage=storage)
    for entry in ("o_proj", "self_attn"):
        with pytest.raises(lora.LoraError, match="quantized and cannot be trained whole.*llm_int8_skip_modules"):
            lora.inject(model, r=4, targets=["down_proj"], train=[entry])
