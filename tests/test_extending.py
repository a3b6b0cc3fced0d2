"""A stranger's file adds a kind of host, an update and a format, and everything works with them: see stranger.py."""

import copy
import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import bilinear, embedding, linear
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora
import stranger
from conftest import randomize, same_bits, snapshot
from lora.files.description import describe
from lora.layers import adapters_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with stranger.registered():
        yield


class Net(nn.Module):
    """An embedding, a Conv1D, a quantized linear, a bilinear layer and a plain linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.conv = Conv1D(8, 6)
        self.packed = stranger.RowLinear(torch.randn(10, 8) / 3, torch.randn(10))
        self.pair = nn.Bilinear(10, 8, 5)
        self.fc = nn.Linear(5, 4)
        nn.init.normal_(self.conv.bias)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.table(ids).tanh()).tanh()
        return self.fc(self.pair(self.packed(h).tanh(), h).tanh())


HOSTS = ["table", "conv", "packed", "pair", "fc"]
IDS = torch.tensor([[0, 3, 3, 10], [7, 1, 0, 2]])
TARGETS = {"kind": ["pair"], "format": ["packed"], "update": ["table", "conv", "fc"], "all": HOSTS}
CASES = [
    pytest.param("kind", {"bias": "lora_only"}, id="kind"),
    pytest.param("format", {}, id="format"),
    pytest.param("update", {"update": "gained"}, id="update"),
    pytest.param("all", {"update": "gained", "bias": "all"}, id="all three"),
    pytest.param("all", {"update": "dora"}, id="kind and format under another's update"),
]
every = pytest.mark.parametrize(("targets", "settings"), CASES)


def adapted(targets: str, settings: dict[str, Any], seed: int = 1) -> Net:
    model = lora.inject(Net(), r=3, alpha=6, targets=TARGETS[targets], **settings)
    return randomize(model, seed=seed)


def weight64(host: Any) -> Tensor:
    """W0 (out, in) in float64, read without the library."""
    if isinstance(host, stranger.RowLinear):
        codes = torch.stack([host.weight >> 4, host.weight & 15], -1).view(host.out_features, -1).double() - 8
        return codes * host.scale.double()[:, None]
    W = host._parameters["weight"].detach().double()
    return W.t() if isinstance(host, (Conv1D, nn.Embedding)) else W.flatten(1)


def oracle(model: Net, own: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The net in float64 with each host's changed weight written out; own: the adapter's parameters."""

    def parts(name: str) -> tuple[Tensor, Tensor | None]:
        host: Any = model.get_submodule(name)
        W, bias = weight64(host), host._parameters.get("bias")
        prefix = f"{name}.lora.default."
        if prefix + "A" in own:
            V = W + 2 * own[prefix + "B"] @ own[prefix + "A"]
            if prefix + "lora_gain" in own:
                V = (1 + own[prefix + "lora_gain"])[:, None] * V
            if prefix + "magnitude" in own:
                V = (own[prefix + "magnitude"] / V.detach().norm(dim=1))[:, None] * V
            W = V
        b = own.get(prefix + "bias", own.get(prefix + "module.bias"))
        return W, b if b is not None or bias is None else bias.detach().double()

    h = embedding(ids, parts("table")[0].t()).tanh()
    h = linear(h, *parts("conv")).tanh()
    W, b = parts("pair")
    y = bilinear(linear(h, *parts("packed")).tanh(), h, W.view(5, 10, 8), b)
    return linear(y.tanh(), *parts("fc"))


def rounding(settings: dict[str, Any]) -> float:
    """Of fp32; DoRA's norms are those of the weight in its own dtype, which is fp16 for the int4 rows."""
    return 2e-3 if settings.get("update") == "dora" else 1e-5


@every
def test_forward_and_backward_are_those_of_the_formula(targets: str, settings: dict[str, Any]) -> None:
    model = adapted(targets, settings)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.partition(".")[0] for n in names} == set(TARGETS[targets])
    own = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters() if n in names}
    want = oracle(model, own, IDS)
    want.square().sum().backward()
    model(IDS).square().sum().backward()
    torch.testing.assert_close(model(IDS).double(), want, rtol=rounding(settings), atol=rounding(settings))
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(
                parameter.grad.double(), own[name].grad, rtol=1e-2, atol=rounding(settings) * 10, msg=name
            )


@every
def test_a_fresh_adapter_changes_no_output(targets: str, settings: dict[str, Any]) -> None:
    model = lora.inject(Net(), r=3, targets=TARGETS[targets], **settings)
    torch.testing.assert_close(model(IDS), Net()(IDS), rtol=1e-6, atol=1e-6)


@every
def test_checkpointing_changes_no_bit(targets: str, settings: dict[str, Any]) -> None:
    model = adapted(targets, {**settings, "dropout": 0.5}).train()
    grads = []
    for call in (model, lambda ids: checkpoint(model, ids, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(5)
        call(IDS).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and same_bits(*grads)


@every
def test_saved_and_loaded_it_computes_the_same(targets: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(targets, settings)
    lora.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = lora.load(Net(), tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    assert same_bits(snapshot(loaded), snapshot(model))
    changed = Net()
    host: Any = changed.get_submodule(TARGETS[targets][0])
    with torch.no_grad():
        (host.scale if targets == "format" else host.weight).mul_(2)
    with pytest.raises(lora.LoraError, match="trained on another base"):
        lora.load(changed, tmp_path)


@every
def test_inspect_describes_the_file(targets: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(targets, settings)
    lora.save(model, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "lora.cli", "inspect", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == str(describe(tmp_path)).split() and "checksum: verified" in done.stdout
    described = describe(tmp_path)
    assert [t.name for t in described.targets] == sorted(TARGETS[targets])
    assert {t.scaling for t in described.targets} == {2} and not described.incomplete
    assert described.parameters == lora.summary(model).trainable
    assert ("update gained" in done.stdout) == (settings.get("update") == "gained")


@every
@pytest.mark.filterwarnings("ignore:merge.*kept less than")
def test_merged_it_computes_the_same_and_unmerged_it_is_the_base_to_the_bit(
    targets: str, settings: dict[str, Any]
) -> None:
    model = adapted(targets, settings)
    before, out = snapshot(model), model(IDS)
    classes = [type(m) for m in model.modules()]
    wanted = {name: changed_weight(model, name) for name in TARGETS[targets]}
    report = lora.merge(model)
    assert {m.name for m in report.modules} >= set(TARGETS[targets])
    torch.testing.assert_close(model(IDS), out, rtol=1e-4, atol=1e-5)
    for name, W in wanted.items():
        near = rounding(settings) / 10
        torch.testing.assert_close(weight64(model.get_submodule(name)), W, rtol=10 * near, atol=near)
    assert all(row.runs == "merged" for row in lora.summary(model).rows)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        lora.unmerge(each)
        assert same_bits(snapshot(each), before)
        assert torch.equal(each(IDS), out)
    assert [type(m) for m in model.modules()] == classes


def changed_weight(model: Net, name: str) -> Tensor:
    """The host's weight under what acts, from its answers: W x for each unit vector x."""
    own = {n: p.detach().double() for n, p in model.named_parameters()}
    W, prefix = weight64(model.get_submodule(name)), f"{name}.lora.default."
    V = W + 2 * own[prefix + "B"] @ own[prefix + "A"]
    if prefix + "lora_gain" in own:
        return (1 + own[prefix + "lora_gain"])[:, None] * V
    return (own[prefix + "magnitude"] / V.norm(dim=1))[:, None] * V if prefix + "magnitude" in own else V


@every
def test_the_summary_counts_and_names_what_is_there(targets: str, settings: dict[str, Any]) -> None:
    model = adapted(targets, settings)
    rows = {row.target: row for row in lora.summary(model).rows}
    assert list(rows) == [name for name in HOSTS if name in TARGETS[targets]]
    for name, row in rows.items():
        parameters = dict(adapters_of(model.get_submodule(name))["default"].named_parameters())
        assert row.parameters == sum(p.numel() for p in parameters.values()) > 0
        assert row.r == 3 and row.shape == tuple(weight64(model.get_submodule(name)).shape)
    assert "pair" not in rows or (rows["pair"].kind.split()[0], rows["pair"].runs) == ("Bilinear", "bilinear")
    dora = settings.get("update") == "dora" or settings.get("dora", False)
    assert all(row.kind.endswith(" DoRA") == dora for row in rows.values())
    assert "packed" not in rows or "int4" in str(lora.summary(model))
    assert ("a note of its own" in str(lora.summary(model))) == ("packed" in rows)


@every
def test_it_rests_acts_again_and_leaves_no_trace(targets: str, settings: dict[str, Any]) -> None:
    model, base = Net(), Net()
    state, classes = snapshot(model), [type(m) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    randomize(lora.inject(model, r=3, alpha=6, targets=TARGETS[targets], name="a", **settings))
    lora.inject(model, r=3, targets=TARGETS[targets], name="b", **settings)
    lora.activate(model, "a")
    out = model(IDS)
    with lora.disabled(model):
        assert torch.allclose(model(IDS), base(IDS), rtol=1e-6, atol=1e-6)
    assert torch.equal(model(IDS), out)
    lora.activate(model, None)
    assert torch.allclose(model(IDS), base(IDS), rtol=1e-6, atol=1e-6)
    if settings.get("bias") != "all":
        lora.activate(model, ["a", "b"])  # what both make adds, and a fresh one changes nothing
        torch.testing.assert_close(model(IDS), out, rtol=1e-4, atol=1e-5)
    lora.activate(model, "a")
    assert torch.equal(model(IDS), out)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), out)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    lora.remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == trained
    assert same_bits(snapshot(model), state) and torch.equal(model(IDS), base(IDS))


def test_all_linear_means_linears_of_every_format_and_no_bilinear_layer() -> None:
    model = lora.inject(Net(), targets="all-linear")
    assert [name for name in HOSTS if adapters_of(model.get_submodule(name))] == ["conv", "packed", "fc"]


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (
            lambda: lora.inject(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), targets=["0"]),
            r"nn\.Bilinear.*stranger' RowLinear",
        ),
        (lambda: lora.inject(Net(), targets=["fc"], update="gain"), "near names: gained"),
        (lambda: lora.merge(adapted("format", {}), into="int5"), "'int4'"),
    ],
    ids=["targets", "update", "into"],
)
def test_errors_that_list_what_there_is_list_the_strangers(verb: Callable[[], object], words: str) -> None:
    with pytest.raises(lora.LoraError, match=words):
        verb()


def test_it_takes_under_150_lines_and_public_registration_alone() -> None:
    text = Path(stranger.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert not re.findall(r"from lora[.\w]* import .*\b_|lora[.\w]*\._|setattr|monkeypatch", text)


def test_a_file_that_names_an_update_which_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    lora.save(adapted("update", {"update": "gained"}), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_update"] == "gained"
    lora.updates.unregister(stranger.Gained)
    try:
        with pytest.raises(lora.LoraError, match="update: got 'gained'"):
            lora.load(Net(), tmp_path)
    finally:
        lora.updates.register(stranger.Gained)


def test_the_worked_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.S))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("convolution") == 2 and "Conv2d" in done.stdout
    assert [t.name for t in describe(tmp_path / "adapter").targets] == ["0", "2"]
