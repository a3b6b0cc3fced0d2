"""Modules whose parent reads their weight and never calls them are found in its source, and named."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize
from lora import LoraError
from lora.layers import hosts
from said import said

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _, _ in hosts(model)]


class Reader(nn.Module):
    """Calls `up`, reads the weight of `dt`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.dt = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) @ self.dt.weight.T + self.dt.bias


class Heir(Reader):
    """Reads in a base class what it calls itself."""

    def extra(self, x: Tensor) -> Tensor:
        return self.dt(x)


class HandsOn(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x) + self.dt.weight.sum()


def apply(module: nn.Module, x: Tensor) -> Tensor:
    return module.dt(module.up(x))


class ByPart(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(self.up, self.dt)(x) + self.dt.weight.sum()


class GoesThrough(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x + self.dt.weight.sum()


class Regularized(nn.Sequential):
    """Its forward, torch's own, goes through `self`."""

    def __init__(self) -> None:
        super().__init__(OrderedDict(up=nn.Linear(4, 4), dt=nn.Linear(4, 4)))

    def penalty(self) -> Tensor:
        return self.dt.weight.pow(2).sum()


class ByName(Reader):
    def parts(self) -> list[nn.Module]:
        return [getattr(self, name) for name in ("up", "dt")]

    def forward(self, x: Tensor) -> Tensor:
        up, dt = self.parts()
        return dt(up(x)) + self.dt.weight.sum()


class HandsOnByKeyword(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return apply(x=x, module=self) + self.dt.weight.sum()


class HasAnotherName(Reader):
    def forward(self, x: Tensor) -> Tensor:
        me = self
        return apply(me, x) + self.dt.weight.sum()


class Container(nn.Module):
    """Has no forward: others call its children."""

    def __init__(self) -> None:
        super().__init__()
        self.dt = nn.Linear(4, 4)

    def penalty(self) -> Tensor:
        return self.dt.weight.pow(2).sum()


class OnlyAtStart(nn.Module):
    """Reads the weight to initialize it; a module around it calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.dt = nn.Linear(4, 4)
        nn.init.zeros_(self.dt.weight)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.dt.weight)


class CalledFromAround(nn.Module):
    """The inner module reads, the outer one calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reader()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.dt(self.inner(x))


class Asks(Reader):
    """As transformers' Jamba: what runs depends on what the config has."""

    config: object = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if hasattr(self.config, "is_quantized"):
            return self.dt(x)
        return x @ self.dt.weight.T


class Config:
    is_quantized = True


CALLED = [Heir, HandsOn, ByPart, GoesThrough, OnlyAtStart, CalledFromAround]
CALLED += [Regularized, ByName, HandsOnByKeyword, HasAnotherName, Container]


@pytest.mark.parametrize("kind", CALLED)
def test_a_module_that_somebody_may_call_is_adapted(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"m": kind()})
    with said():
        lora.inject(model, targets=["dt"])
    assert len(adapted(model)) == 1


def test_weight_reader_is_refused_where_it_is_named_and_left_out_otherwise() -> None:
    for targets in (["dt"], ["up", "dt"], r"m\..*"):
        with pytest.raises(
            LoraError, match=r"dt \(1\) in Reader, which reads their weight.*as on 'm.dt'; .*exclude=\['dt'\]"
        ):
            lora.inject(nn.ModuleDict({"m": Reader()}), targets=targets)
    model = nn.ModuleDict({"m": Reader(), "n": Reader()})
    with said("leaves out dt (2) in Reader"):
        lora.inject(model, targets="all-linear")
    assert adapted(model) == ["m.up", "n.up"]
    with said():
        lora.inject(nn.ModuleDict({"m": Reader()}), targets="all-linear", exclude=["dt"])


def test_weight_reader_is_refused_where_nothing_else_is_left() -> None:
    wavlm = next(model for name, model, _ in mixers() if name == "wavlm")
    with pytest.raises(LoraError, match=r"q_proj \(2\) in WavLMAttention, which reads their weight"):
        lora.inject(wavlm)


def test_weight_reader_among_the_default_targets_is_left_out() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) @ self.v_proj.weight

    model = nn.ModuleDict({"a": Attention(), "b": Attention()})
    with said("targets: None leaves out v_proj (2) in Attention", "targets: None picked ['q_proj']"):
        lora.inject(model)
    assert adapted(model) == ["a.q_proj", "b.q_proj"]


def test_weight_reader_is_told_by_its_full_name_where_others_of_its_name_are_called() -> None:
    model = nn.ModuleDict({"m": Reader(), "n": Heir()})
    with pytest.raises(LoraError, match=r"exclude=\['m.dt'\]"):
        lora.inject(model, targets=["dt"])
    lora.inject(model, targets=["dt"], exclude=["m.dt"])
    assert adapted(model) == ["n.dt"]


def test_weight_reader_that_depends_on_the_config_is_told_for_this_model() -> None:
    model = nn.ModuleDict({"m": Asks()})
    with pytest.raises(LoraError, match="in Asks, which reads"):
        lora.inject(model, targets=["dt"])
    model.m.config = Config()
    lora.inject(model, targets=["dt"])
    assert adapted(model) == ["m.dt"]


def test_weight_reader_that_is_shared_with_a_module_that_calls_it_is_adapted() -> None:
    model = nn.ModuleDict({"m": Reader(), "n": Heir()})
    model.n.dt = model.m.dt
    lora.inject(model, targets=["dt"])
    assert adapted(model) == ["m.dt"]


def test_weight_reader_whose_source_is_not_there_is_left_to_the_first_backward_pass() -> None:
    scope: dict = {"nn": nn}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.up, self.dt = nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return self.up(x) @ self.dt.weight",
        scope,
    )
    model = nn.ModuleDict({"m": scope["Hidden"]()})
    lora.inject(model, targets=["up", "dt"])
    with said("dt (1)"):
        model.m(X).sum().backward()


def test_a_method_without_source_may_call_what_others_read() -> None:
    scope: dict = {"Reader": Reader}
    exec("class Hidden(Reader):\n    def forward(self, x):\n        return self.dt(self.up(x))", scope)
    model = nn.ModuleDict({"m": scope["Hidden"]()})
    with said():
        lora.inject(model, targets=["up", "dt"])
        model.m(X).sum().backward()


def test_weight_reader_in_a_file_is_told_of_when_it_is_loaded(tmp_path: Path) -> None:
    source = nn.ModuleDict({"m": Heir()})
    lora.inject(source, targets=["dt"], r=2)
    lora.save(randomize(source), tmp_path)
    model = nn.ModuleDict({"m": Reader()})
    model.load_state_dict({k: v for k, v in source.state_dict().items() if ".lora." not in k})
    before = model.m(X)
    with said("what the adapter has on dt (1) in Reader"):
        lora.load(model, tmp_path)
    assert torch.equal(model.m(X), before)
    lora.merge(model)
    assert not torch.equal(model.m(X), before)


def test_weight_reader_trained_whole_acts_because_its_weight_is_seen() -> None:
    model = lora.inject(nn.ModuleDict({"m": Reader()}), targets=["up"], train=["dt"])
    before = model.m(X)
    with said():
        before.sum().backward()
    assert model.m.dt.lora["default"].module.weight.grad.any()
    assert not torch.equal(randomize(model).m(X), before)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_projection_of_multihead_attention_trained_whole_acts(bias: str) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    lora.inject(model, targets=["up"], train=["out_proj"], bias=bias)
    y = model.a(model.up(X), X, X)[0]
    y.sum().backward()
    assert model.a.out_proj.lora["default"].module.weight.grad.any()
    with torch.no_grad():
        assert not torch.equal(randomize(model).eval().a(model.up(X), X, X)[0], y)


def mixers() -> Iterator[tuple[str, nn.Module, str]]:
    import transformers as hf

    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 31, "state_size": 4}
    yield "mamba", hf.MambaModel(hf.MambaConfig(**small)), "dt_proj (2)"
    yield "falcon_mamba", hf.FalconMambaModel(hf.FalconMambaConfig(**small)), "dt_proj (2)"
    jamba = hf.JambaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, vocab_size=31, num_attention_heads=2,
        num_key_value_heads=2, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        use_mamba_kernels=False,
    )  # fmt: skip
    yield "jamba", hf.JambaModel(jamba), "dt_proj (1)"
    wavlm = hf.WavLMConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, conv_dim=[16],
        conv_stride=[5], conv_kernel=[5], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    yield "wavlm", hf.WavLMModel(wavlm), "k_proj (2), v_proj (2), q_proj (2) and out_proj (2)"


def test_weight_reader_of_transformers_is_left_out_by_name_and_all_others_train() -> None:
    for name, model, words in mixers():
        with said(words):
            lora.inject(model, targets="all-linear", r=2)
        assert len(adapted(model)) > 2, name
        if name == "wavlm":
            continue
        model.train()
        with said():  # the first backward pass finds no other
            model(torch.arange(1, 8)[None]).last_hidden_state.sum().backward()
