"""Memory estimated before a run: beside peaks that were measured on cards, and beside a step that runs here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import lora
from lora import LoraError
from lora.bases.planned import PlannedLinear
from lora.commands import app
from lora.ops import rehearsal
from lora.train.estimate import GIB, Estimate, estimate
from lora.train.ledger import Ledger, rounded, tensors_of
from lora.train.recipe import Recipe

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "8 layers": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 1000},
}  # fmt: skip
CHECKPOINTING, LIGER = {"gradient_checkpointing": True}, {"liger": True}
BOTH = {**CHECKPOINTING, **LIGER}
# From benchmarks/results: train_step_h200.csv, train_step_h100.csv, quantized_h200.csv.
MEASURED: list[tuple[str, int, int, dict[str, Any], float]] = [
    ("8 layers", 4, 2048, LIGER, 11.18),
    ("8 layers", 4, 2048, {**LIGER, "dropout": 0.05}, 11.15),
    ("8 layers", 4, 2048, {}, 16.42),
    ("8 layers", 4, 2048, BOTH, 5.74),
    ("8 layers", 4, 2048, CHECKPOINTING, 7.51),
    ("8 layers", 4, 2048, {**LIGER, "dora": True}, 16.44),
    ("7b", 4, 2048, BOTH, 16.36),
    ("7b", 4, 2048, {**BOTH, "quantize": "nf4", "offload": True}, 5.78),
    ("7b", 4, 2048, {**BOTH, "quantize": "nf4"}, 7.45),
    ("7b", 4, 2048, {**BOTH, "quantize": "int8", "offload": True}, 8.78),
    ("7b", 4, 2048, {**BOTH, "quantize": "int8"}, 10.46),
    ("7b", 1, 512, {**BOTH, "quantize": "nf4", "r": 8, "targets": ["q_proj", "v_proj"]}, 4.03),
    ("70b", 1, 2048, {**BOTH, "quantize": "nf4", "offload": True}, 41.27),
    ("70b", 1, 2048, {**BOTH, "quantize": "nf4", "offload": True, "optimizer": "adamw_8bit", "r": 64}, 45.92),
]
QUICK = (0, 3, 7, 9)

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("configs"), {}
    for name, shape in SHAPES.items():
        found[name] = folder / f"{name.replace(' ', '_')}.json"
        LlamaConfig(**COMMON, **shape).to_json_file(found[name], use_diff=False)
    return found


@pytest.fixture(scope="module")
def recipe(configs: dict[str, Path]) -> Make:
    def make(shape: str, **changes: Any) -> Recipe:
        fields = {"model": str(configs[shape]), "data": "-", "out": "-", "r": 16, "targets": LINEARS}
        return Recipe.of(**{**fields, **changes})

    return make


@pytest.mark.parametrize(
    ("shape", "rows", "tokens", "changes", "peak"),
    [case if i in QUICK else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(MEASURED)],
)
def test_the_estimate_is_within_five_per_cent_of_the_peak_that_a_card_measured(
    recipe: Make, shape: str, rows: int, tokens: int, changes: dict[str, Any], peak: float
) -> None:
    found = estimate(recipe(shape, batch_size=rows, max_length=tokens, **changes), device="cuda")
    assert found.peak / GIB == pytest.approx(peak, rel=0.05)
    assert sum(found.parts.values()) == found.peak


@pytest.mark.parametrize(
    "changes", [LIGER, {}, BOTH, {**BOTH, "quantize": "nf4", "offload": True, "grad_accum": 2}], ids=str
)
def test_a_few_layers_tell_of_the_whole_model_to_the_byte(recipe: Make, changes: dict[str, Any]) -> None:
    small = recipe("small", batch_size=4, max_length=4096, **changes)  # above what is worth offloading
    few, whole = (estimate(small, device="cuda", whole=whole) for whole in (False, True))
    assert few.peak == whole.peak and few.moment == whole.moment
    assert {n: s for n, s in few.parts.items() if s} == {n: s for n, s in whole.parts.items() if s}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two that wait for each other take half a minute on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("settings", "checkpointing"),
    [
        ({"r": 8, "targets": "all-linear"}, True),
        ({"r": 4, "targets": ["q_proj"], "dropout": 0.1}, False),
        pytest.param({"r": 8, "targets": "all-linear"}, False, marks=pytest.mark.slow),
    ],
)
def test_on_a_cpu_it_is_what_a_real_step_holds_to_the_byte(
    recipe: Make, settings: dict[str, Any], checkpointing: bool
) -> None:
    config = LlamaConfig(**COMMON, **SHAPES["small"], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora.inject(model, **settings)
    lora.prepare(model, checkpointing=checkpointing).train()
    ledger = Ledger(card=False)
    ledger.leave_out(tensors_of(model))
    ledger.mark("step")
    with ledger:
        inputs = {name: torch.zeros(3, 100, dtype=torch.int64) for name in ("input_ids", "labels")}
        loss = model(**inputs).loss
        del inputs
        loss.backward()
    found = estimate(
        recipe("small", batch_size=3, max_length=100, gradient_checkpointing=checkpointing, **settings), device="cpu"
    )
    before = {"weights", "A and B", "optimizer"}
    assert sum(size for name, size in found.parts.items() if name not in before) == ledger.peaks()["step"].total
    assert found.parts["weights"] == sum(t.nbytes for t in tensors_of(model) if not t.requires_grad)
    assert found.parts["A and B"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["nested nf4", "int8"])
def test_a_planned_weight_has_the_bytes_of_bitsandbytes_own(kind: str) -> None:
    from lora.bases import loadable, weight_of
    from quantized_base import linear

    real = nn.Sequential(linear(kind, 192, 320)).to(torch.bfloat16).to("cpu")[0]
    name = kind.split()[-1]
    weight: Any = weight_of(real)
    tensors, layout = weight.stored()
    assert loadable()[name].planned(name, (320, 192)) == layout
    made = PlannedLinear(layout, None, torch.bfloat16)
    assert sum(t.nbytes for t in tensors_of(made)) == sum(t.nbytes for t in tensors)


def test_a_mask_a_second_batch_and_the_optimizers_change_what_they_should(recipe: Make) -> None:
    def of(padded: bool = False, **changes: Any) -> Estimate:
        settings = {"batch_size": 2, "max_length": 256, "r": 64, **changes}
        return estimate(recipe("small", **settings), device="cuda", padded=padded)

    plain = of()
    assert of(padded=True).peak > plain.peak
    twice = of(grad_accum=2)
    assert twice.parts["gradients"] == twice.parts["A and B"] and twice.peak > plain.peak
    paged = of(optimizer="paged_adamw")
    assert plain.parts["optimizer"] == 2 * plain.parts["A and B"]
    assert of(optimizer="adamw_8bit").parts["optimizer"] < plain.parts["optimizer"]
    assert "paged" in " ".join(paged.notes)
    assert "GPU: 2 x 256 tokens" in str(plain) and "peak" in str(plain)


def test_a_stored_quantization_a_classifier_and_other_architectures_are_estimated(tmp_path: Path) -> None:
    from transformers import BertConfig, GPT2Config

    stored = LlamaConfig(**COMMON, **SHAPES["small"])
    stored.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    gpt2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=200, n_positions=64)
    bert = BertConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=200)
    found = []
    for name, config, task in (("llama", stored, "generate"), ("gpt2", gpt2, "generate"), ("bert", bert, "classify")):
        config.save_pretrained(tmp_path / name)
        settings = {"model": str(tmp_path / name), "data": "-", "out": "-", "task": task, "max_length": 32}
        for device in ("cuda", "cpu"):
            found.append(estimate(Recipe.of(**settings, targets="all-linear"), device=device))
            assert found[-1].peak > found[-1].parts["weights"] > 0
    dense = found[2].parts["weights"]
    assert found[0].dense and not found[2].dense and dense


def test_a_model_that_looks_at_values_has_no_estimate_and_says_so(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids, **_: input_ids.sum().item())
    with pytest.raises(LoraError, match="LlamaForCausalLM cannot be rehearsed without its values"):
        estimate(recipe("small", batch_size=1, max_length=16), device="cpu")
    assert rehearsal.target is None


def test_nothing_of_a_rehearsal_stays(recipe: Make) -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    estimate(recipe("small", batch_size=1, max_length=16, **LIGER), device="cuda")
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert rehearsal.target is None and rehearsal.named is None
    assert not lora.bases.keeps_forward(PlannedLinear)


def test_the_ledger_counts_storages_while_they_live() -> None:
    ledger = Ledger(card=True)
    kept = torch.empty(1000)
    ledger.leave_out([kept])
    ledger.mark("first")
    with ledger:
        kept.add_(1).view(10, 100)
        held = torch.empty(1000)
        held[3:].mul_(2)
        torch.empty(500)
        ledger.mark("second")
        del held
    first, second = ledger.peaks()["first"].total, ledger.peaks()["second"].total
    assert first == rounded(4000) + rounded(2000) == 4096 + 2048
    assert second == rounded(4000)
    assert rounded(43 << 20) == 44 << 20 and rounded((42 << 20) + 512) == (42 << 20) + 512


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "model_type"), ("[", "not the config"), ('{"model_type": "no_such"}', "no_such"), ("9" * 5000, "config")],
)
def test_deep_inputs_a_file_that_is_no_config_is_one_error(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(LoraError, match=said):
        estimate(Recipe.of(model=str(file), data="-", out="-"))


def test_the_command_prints_a_table_or_json(configs: dict[str, Path], tmp_path: Path) -> None:
    run = CliRunner().invoke
    words = [str(configs["small"]), "--targets", "all-linear", "--r", "4", "--batch-size", "2", "--max-length", "64"]
    shown = run(app, ["estimate", *words, "--offload", "--gradient-checkpointing", "--quantize", "nf4"])
    assert shown.exit_code == 0 and "on a GPU: 2 x 64" in shown.output
    found = json.loads(run(app, ["estimate", *words, "--device", "cpu", "--json"]).output)
    assert found["device"] == "cpu" and found["peak"] == sum(found["parts"].values())
    file = tmp_path / "recipe.yaml"
    text = f"model: {configs['small']}\nr: 4\ntargets: all-linear\nbatch_size: 2\nmax_length: 64\n"
    file.write_text(text)  # data and out are left out: nothing is trained
    again = json.loads(run(app, ["estimate", str(file), "--device", "cpu", "--json"]).output)
    assert again["peak"] == found["peak"]
    assert isinstance(run(app, ["estimate", *words, "--device", "tpu"]).exception, LoraError)
    assert isinstance(run(app, ["estimate", *words, "--device", "cpu", "--liger"]).exception, LoraError)
