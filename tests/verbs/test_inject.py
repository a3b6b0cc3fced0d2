"""inject: what it changes, what it leaves, what it refuses and how it says so."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import MODELS, randomize, same_bits, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from lora import LoraConfig, LoraError, LoraWarning
from lora.layers import LoraLayer, hosts


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return self.head(self.norm(x))


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _, _ in hosts(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_adapter_changes_no_output_bit(architecture: str, ids: Tensor, dtype: torch.dtype) -> None:
    build, targets = MODELS[architecture]
    model = build().to(dtype)
    before = model(ids).logits
    lora.inject(model, r=4, targets=targets, dropout=0.1, bias="all")
    assert torch.equal(model(ids).logits.view(-1).view(torch.uint8), before.view(-1).view(torch.uint8))


def test_inject_keeps_the_models_identity(architecture: str) -> None:
    build, targets = MODELS[architecture]
    model = build()
    kind, modules, keys = type(model), dict(model.named_modules()), set(model.state_dict())
    assert lora.inject(model, targets=targets) is model
    assert type(model) is kind
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert keys <= set(model.state_dict())
    host = next(h for _, h, _ in hosts(model))
    assert isinstance(host, LoraLayer)
    assert isinstance(host, nn.Linear) or architecture == "gpt2"


def test_remove_leaves_classes_weights_keys_and_flags_as_they_were(architecture: str, ids: Tensor) -> None:
    build, targets = MODELS[architecture]
    model = build()
    next(model.parameters()).requires_grad_(False)
    state, logits = snapshot(model), model(ids).logits
    classes = {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    lora.inject(model, targets=targets, bias="all")
    lora.inject(randomize(model), targets=targets[:1], name="second")
    randomize(model)
    assert not torch.equal(model(ids).logits, logits)
    lora.remove(model)
    assert same_bits(snapshot(model), state)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert torch.equal(model(ids).logits, logits)


def test_only_the_adapter_trains_and_in_fp32() -> None:
    model = lora.inject(tiny_llama().bfloat16(), r=4, targets=["q_proj"])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"model.layers.{i}.self_attn.q_proj.lora.default.{m}" for i in range(3) for m in "AB"}
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_gaussian_and_kaiming_starts() -> None:
    torch.manual_seed(0)
    for init, std in (("gaussian", 1 / 32), ("kaiming", 1 / (3 * 512) ** 0.5)):
        net = nn.Sequential(nn.Linear(512, 512))
        lora.inject(net, r=32, targets=["0"], init=init)
        part = net[0].lora["default"]
        assert part.A.std().item() == pytest.approx(std, rel=0.05)
        assert not part.B.any()


def test_targets_list_regex_all_linear_and_none() -> None:
    assert len(adapted(lora.inject(Net(), targets=["up"]))) == 4
    assert adapted(lora.inject(Net(), targets=["layers.2.up", "head"])) == ["layers.2.up", "head"]
    assert adapted(lora.inject(Net(), targets=r"layers\.[01]\.(up|down)")) == [
        "layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down",
    ]  # fmt: skip
    assert "lm_head" not in adapted(lora.inject(tiny_llama(), targets="all-linear"))
    assert len(adapted(lora.inject(tiny_llama(), targets="all-linear"))) == 3 * 7
    assert not [n for n in adapted(lora.inject(tiny_bert(), targets="all-linear")) if n.startswith("classifier")]
    with pytest.warns(LoraWarning, match=r"picked \['q_proj', 'v_proj'\]"):
        assert len(adapted(lora.inject(tiny_llama()))) == 6
    with pytest.warns(LoraWarning, match="query"):
        lora.inject(tiny_bert())
    with pytest.warns(LoraWarning, match="c_attn"):
        lora.inject(tiny_gpt2())


def test_exclude_layers_and_patterns() -> None:
    net = lora.inject(Net(), targets=["up", "down"], exclude=["layers.3.down"], layers=[1, 3])
    assert adapted(net) == ["layers.1.up", "layers.1.down", "layers.3.up"]
    net = lora.inject(
        Net(), r=4, alpha=8, targets=["up", "down"], rslora=True,
        rank_pattern={"down": 2, r"layers\.0\.up": 1}, alpha_pattern={"up": 3},
    )  # fmt: skip
    got = {n: (a["default"].r, a["default"].scaling) for n, _, a in hosts(net)}
    assert got["layers.0.up"] == (1, 3.0)
    assert got["layers.1.up"] == (4, 1.5)
    assert got["layers.1.down"] == (2, pytest.approx(8 / 2**0.5))


def test_train_whole_modules_and_bias_modes() -> None:
    net = lora.inject(Net(), targets=["up"], train=["head", "norm"], bias="lora_only")
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {
        "head.lora.default.module.weight",
        "norm.lora.default.module.bias",
        "layers.0.up.lora.default.bias",
    } <= trained
    assert "head.weight" not in trained
    net = lora.inject(Net(), targets=["up"], bias="all")
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert len([n for n in trained if n.endswith("bias")]) == 4 + 4 + 1 + 1
    assert not [n for n in trained if n.endswith("module.weight")]


def test_a_module_shared_by_two_names_is_wrapped_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net.again = net[0]
    lora.inject(net, targets=["0", "2"], r=2)
    assert adapted(net) == ["0", "2"]
    assert net.again.lora is net[0].lora


def test_inject_follows_the_models_mode() -> None:
    for mode in (True, False):
        model = lora.inject(tiny_llama().train(mode), targets=["q_proj"], dropout=0.5)
        assert all(m.training is mode for m in model.modules())


def test_dropout_acts_in_training_only(ids: Tensor) -> None:
    model = randomize(lora.inject(tiny_llama(), targets=["q_proj"], dropout=0.5))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_hooks_on_a_target_still_run_and_remove_keeps_them() -> None:
    net, calls = Net(), []
    net.head.register_forward_hook(lambda m, a, out: calls.append(out.shape))
    lora.inject(net, targets=["head"])
    net(torch.randn(2, 8))
    lora.remove(net)
    net(torch.randn(2, 8))
    assert len(calls) == 2


def test_accelerates_hooks_do_not_pass_the_adapter_by() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    net, x = Net(), torch.randn(2, 8)
    base = net(x)
    add_hook_to_module(net.head, AlignDevicesHook(execution_device="cpu"))
    randomize(lora.inject(net, targets=["head"]))
    moved = net(x)
    assert not torch.equal(moved, base)
    lora.remove(net)
    assert torch.equal(net(x), base)
    lora.inject(net, targets=["head"])
    remove_hook_from_module(net.head)
    assert torch.equal(net(x), base)


REFUSED = [
    ({"targets": ["q_prj"]}, "targets: 'q_prj' fits no module.*near names: q_proj"),
    ({"targets": ["q_proj", "nope"]}, "'nope' fits no module"),
    ({"targets": "q_proj"}, "fits no adaptable module's full name"),
    ({"targets": ["self_attn"]}, "a LlamaAttention; supported are.*inside it there are: q_proj"),
    ({"targets": ["norm"]}, "a LlamaRMSNorm; supported are nn.Linear, nn.Embedding, transformers' Conv1D and"),
    ({"targets": []}, r"targets: got \[\]"),
    ({"targets": "("}, "no regular expression"),
    ({"r": 0, "targets": ["q_proj"]}, "r: got 0; the rank is a whole number of at least 1"),
    ({"r": True, "targets": ["q_proj"]}, "r: got True"),
    (
        {"r": -1, "alpha": 0, "dropout": 1.0, "bias": "some"},
        "(?s)r: got -1.*alpha: got 0.*dropout: got 1.0.*bias: got 'some'",
    ),
    ({"alpha": float("nan"), "targets": ["q_proj"]}, "alpha: got nan"),
    ({"init": "pissa", "targets": ["q_proj"]}, "init: got 'pissa'; one of gaussian, kaiming"),
    ({"rank": 8, "targets": ["q_proj"]}, "rank: no such argument; near names: .*rank_pattern"),
    ({"targets": ["q_proj"], "exclude": ["zzz"]}, "exclude: 'zzz' fits no module"),
    ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "leave none of them"),
    ({"targets": ["q_proj"], "layers": [1, 7]}, "layers: no target lies in layer 7; the targets lie in layers 0 to 2"),
    ({"targets": ["q_proj"], "rank_pattern": {"v_proj": 4}}, "rank_pattern: 'v_proj' fits none of the 3 targets"),
    ({"targets": ["q_proj"], "alpha_pattern": {"x": 4}}, "alpha_pattern: 'x' fits none"),
    ({"targets": ["q_proj"], "rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: got 0"),
    ({"targets": ["q_proj"], "train": ["lm_hed"]}, "train: 'lm_hed' fits no module.*lm_head"),
    ({"targets": ["q_proj"], "name": "../x"}, "name: got '../x'"),
    ({"targets": ["q_proj"], "name": "a" * 65}, "1 to 64"),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED, ids=[str(i) for i, _ in enumerate(REFUSED)])
def test_a_wrong_call_says_what_to_do_and_changes_nothing(keywords: dict, message: str) -> None:
    model = tiny_llama()
    state, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoraError, match=message):
        lora.inject(model, **keywords)
    assert same_bits(snapshot(model), state)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not list(hosts(model))


def test_config_and_keywords_exclude_each_other() -> None:
    with pytest.raises(LoraError, match="config: got one and also r"):
        lora.inject(tiny_llama(), config=LoraConfig(targets=["q_proj"]), r=4)
    model = lora.inject(tiny_llama(), config=LoraConfig(r=3, targets=["q_proj"]))
    assert next(a for _, _, a in hosts(model))["default"].r == 3


def test_a_name_in_use_is_refused() -> None:
    model = lora.inject(tiny_llama(), targets=["q_proj"])
    with pytest.raises(LoraError, match="already has an adapter 'default'"):
        lora.inject(model, targets=["v_proj"])


@pytest.mark.parametrize("name", ["forward", "train", "keys", "A", "training", "0", "a-b_c"])
def test_any_legal_name_works(name: str, ids: Tensor) -> None:
    model = randomize(lora.inject(tiny_llama(), targets=["q_proj"], name=name))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)
    lora.remove(model, name)
    assert not list(hosts(model))


def test_linears_that_are_never_called_are_refused() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(LoraError, match="in MultiheadAttention, which reads their weight and never calls them"):
        lora.inject(attention, targets=["out_proj"])
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, batch_first=True))
    with pytest.raises(LoraError, match="set_fastpath_enabled"):
        lora.inject(encoder, targets=["linear1"])


def test_a_linear_with_a_forward_of_its_own_is_refused() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    with pytest.raises(LoraError, match="forward of its own"):
        lora.inject(nn.Sequential(Odd(4, 4)), targets=["0"])
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(LoraError, match="replaced on the instance"):
        lora.inject(net, targets=["0"])


def test_summary_counts_and_table() -> None:
    model = lora.inject(tiny_llama(), r=4, targets=["q_proj", "v_proj"], train=["lm_head"])
    got = lora.summary(model)
    expected = 3 * (4 * 96 + 4 * (48 + 24)) + 97 * 48
    assert got.trainable == expected == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(r.parameters for r in got.rows) == expected
    assert got.bytes == 4 * expected
    text = str(got)
    for piece in ("model.layers.*.self_attn.q_proj", "24 x 48", f"{expected:,}", "acting: default"):
        assert piece in text
    with pytest.raises(LoraError, match=r"no adapter; call lora\.inject"):
        lora.summary(tiny_llama())


def test_several_resident_adapters_act_as_chosen(ids: Tensor) -> None:
    model = tiny_llama()
    base = model(ids).logits
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        lora.inject(model, targets=["q_proj"] if seed else ["q_proj", "v_proj"], r=2 + seed, name=name)
        randomize(model, seed=seed)
        outputs[name] = model(ids).logits
        lora.activate(model, None)
        for p in model.parameters():
            p.requires_grad_(False)
    assert torch.equal(model(ids).logits, base)
    for name, logits in outputs.items():
        lora.activate(model, name)
        assert torch.equal(model(ids).logits, logits)
    lora.activate(model, ["one", "two"])
    both = model(ids).logits
    lora.activate(model, ["two", "one"])
    torch.testing.assert_close(model(ids).logits, both, rtol=1e-4, atol=1e-5)
    with pytest.raises(LoraError, match="no adapter 'on'.*near names: one"):
        lora.activate(model, ["two", "on"])
    with pytest.raises(LoraError, match="a name twice"):
        lora.activate(model, ["two", "two"])


def test_adding_and_removing_through_another_root_is_refused() -> None:
    net = nn.ModuleDict({"encoder": Net(), "decoder": Net()})
    lora.inject(net["encoder"], targets=["up"])
    for call in (lambda: lora.remove(net), lambda: lora.inject(net, targets=["up"], name="b")):
        with pytest.raises(LoraError, match="through the same module"):
            call()
    lora.remove(net["encoder"])
    assert all(p.requires_grad for p in net.parameters())


def test_code_that_reads_the_weight_of_a_module_trained_whole_sees_the_copy() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mid = nn.Embedding(7, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.mid(self.emb(ids)), self.emb.weight)

    model = randomize(lora.inject(Tied(), targets=["mid"], train=["emb"]))
    want = model(torch.arange(7))
    lora.merge(model)
    torch.testing.assert_close(model(torch.arange(7)), want)


def test_replicas_of_data_parallel_are_refused() -> None:
    net = lora.inject(Net(), targets=["up"])
    replica = net.layers[0]["up"]._replicate_for_data_parallel()
    with pytest.raises(LoraError, match="DistributedDataParallel"):
        replica(torch.randn(2, 8))


def test_replicas_of_a_table_are_refused_too() -> None:
    table = lora.inject(nn.Sequential(nn.Embedding(9, 4)), r=2, targets=["0"])[0]
    with pytest.raises(LoraError, match="DataParallel is not supported"):
        table._replicate_for_data_parallel()(torch.arange(3))
