"""DoRA over quantized weights: what acts, with and without gradients, and the merge in both forms."""

import pytest
import torch
from torch import nn

import lora
from conftest import same_bits, snapshot
from dora_oracle import error, fill
from lora.layers import adapters_of
from quantized_base import inputs, net, values
from two_kinds import merge

kinds = pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
modes = pytest.mark.parametrize("training", [True, False])
TARGETS = ["0", "2", "4"]


def exact(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """By the definition, over what bitsandbytes says that each weight stands for."""
    y = x.double()
    for i, module in enumerate(model):
        if i % 2:
            y = module(y)
            continue
        part, W = adapters_of(module)["default"], values(module).double()
        V = W + part.scaling * part.B.detach().double() @ part.A.detach().double()
        y = y @ (part.magnitude.detach().double()[:, None] * V / V.norm(dim=1, keepdim=True)).t() + module.bias.double()
    return y.detach()


@kinds
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_fresh_adapter_changes_no_bit(kind: str, training: bool, dtype: torch.dtype) -> None:
    model, x = lora.inject(net(kind, dtype), targets=TARGETS, dora=True).train(training), inputs(dtype)
    for names in ("default", ["default", "second"]):
        with torch.no_grad():
            got = model(x)
            with lora.disabled(model):
                assert torch.equal(model(x), got), names
        if names == "default":
            lora.inject(model, targets=TARGETS, dora=True, name="second")
            lora.activate(model, ["default", "second"])


@kinds
@modes
def test_what_acts_is_the_definition(kind: str, training: bool) -> None:
    model = fill(lora.inject(net(kind), targets=TARGETS, dora=True)).train(training)
    x = inputs()
    wanted = exact(model, x)
    with torch.no_grad():
        assert error(model(x), wanted) < 2e-2
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


@kinds
@pytest.mark.parametrize("again", [False, True])
def test_merge_and_the_way_back(kind: str, again: bool) -> None:
    model = fill(lora.inject(net(kind), targets=TARGETS, dora=True))
    x, before = inputs(), snapshot(model)
    wanted = exact(model, x)
    merge(model, into=kind[-4:].strip() if again else None)
    assert error(model(x).detach(), wanted) < (0.3 if again else 2e-2)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)
