"""Runs on quantized bases, and with what else bitsandbytes and Liger bring."""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lora
from conftest import tiny_llama
from lora import LoraError
from lora.bases.weight import weight_of
from lora.data.collate import PaddingCollator
from lora.data.encode import encode_rows
from lora.data.template import PromptTemplate
from lora.train import Recipe, load_recipe, run, trainer
from lora.train import adapted as adapted_module
from lora.train import job as job_module
from lora.train import needs as needs_module
from lora.train import rows as rows_module
from lora.train.adapted import adapted
from lora.train.base import load_base
from lora.train.length import Length
from lora.train.quiet import quiet
from lora.train.watch import Watch
from tiny_base import save_tiny_base

ROWS = [{"prompt": f"count {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 13)]
KINDS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def stored(bnb: ModuleType, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base as people save it quantized, by kind, in bf16 where it is not."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        load_base(str(base), torch.bfloat16, kind).save_pretrained(folders[kind])
        job_module.load_tokenizer(str(base)).save_pretrained(folders[kind])
    return folders


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(**changes: Any) -> Recipe:
        fields = {
            "model": str(base),
            "data": str(rows),
            "out": str(tmp_path / "out"),
            "targets": "all-linear",
            "max_steps": 2,
            "batch_size": 12,
            "lr": 1e-2,
            "schedule": "constant",
            "warmup_steps": 0,
            "dtype": "fp32",
            "log_every": 1,
        }
        return Recipe.of(**{**fields, **changes})

    return make


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((adapted_module, "load_base"), (job_module, "load_tokenizer"), (rows_module, "read_rows")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something was loaded first"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def known_base(out: Path) -> dict[str, Any]:
    """What the adapter's file says of its base."""
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lora.base"])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_base_quantized_for_it(
    bnb: ModuleType, recipe: Callable[..., Recipe], base: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    before = contents(base)
    plan = recipe(quantize=kind, max_steps=3, gradient_checkpointing=True)
    out = run(plan).out
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert contents(base) == before
    record = record_of(out)
    assert record["quantisation"] == {"nf4": "double-quantised nf4"}.get(kind, kind)
    assert math.isfinite(record["metrics"]["loss"])
    assert known_base(out)["quantisation"] == record["quantisation"]
    parts = load_file(out / "adapter_model.safetensors")
    assert len(parts) == 28  # 7 linears of 2 layers: A and B of each, and nothing of the base
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert all(part.abs().max() > 0 for key, part in parts.items() if "lora_B" in key)
    written = load_recipe(out / "checkpoints" / "recipe.yaml")  # what was open is decided there
    assert {name: getattr(written, name) for name in plan.model_fields_set} == plan.model_dump(exclude_unset=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_the_dequantized_bases(bnb: ModuleType, recipe: Callable[..., Recipe], kind: str) -> None:
    name = recipe().model
    first = run(recipe(quantize=kind, max_steps=1)).metrics["loss"]
    plain = run(recipe(max_steps=1), force=True).metrics["loss"]
    model = load_base(name, torch.float32)
    # Not by bitsandbytes: its CPU kernels take rows that are no multiple of a block for ones that are.
    linears = {n: m for n, m in load_base(name, torch.float32, kind).named_modules() if "Linear" in type(m).__name__}
    del linears["lm_head"]
    model.load_state_dict({f"{n}.weight": weight_of(m).dense(torch.float32) for n, m in linears.items()}, strict=False)
    rows = encode_rows(ROWS, PromptTemplate(job_module.load_tokenizer(name)), 128).rows
    with torch.no_grad():
        own = model(**PaddingCollator(0)(rows)).loss.item()
    assert first == pytest.approx(own, rel=1e-5)
    assert abs(first - plain) > 1e-4 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_a_base_is_quantized(bnb: ModuleType, base: Path, dtype: torch.dtype) -> None:
    model = load_base(str(base), dtype, "nf4")
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is bnb.nn.Linear4bit
    assert (linear.weight.quant_type, linear.weight.quant_state.nested) == ("nf4", True)
    assert linear.compute_dtype == dtype
    assert model.model.norm.weight.dtype == dtype
    model = load_base(str(base), dtype, "int8")
    assert type(model.model.layers[0].mlp.up_proj) is bnb.nn.Linear8bitLt
    assert model.model.norm.weight.dtype == dtype
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_stored_quantized_is_taken_as_it_is(
    recipe: Callable[..., Recipe], stored: dict[str, Path], kind: str
) -> None:
    before = contents(stored[kind])
    for quantize in ("none", kind):
        out = run(recipe(model=str(stored[kind]), quantize=quantize, max_steps=1), force=True).out
        assert kind in record_of(out)["quantisation"]
    assert contents(stored[kind]) == before
    codes = load_file(stored[kind] / "model.safetensors")
    model = load_base(str(stored[kind]), torch.float32)
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(key).data.view(torch.uint8), codes[key].view(torch.uint8))
    # What is not quantized is in the dtype that was asked for, whatever it is stored in.
    assert codes["model.norm.weight"].dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(("kind", "asked"), [("nf4", "int8"), ("int8", "nf4")])
def test_another_quantization_than_the_stored_one_is_an_error(
    recipe: Callable[..., Recipe],
    stored: dict[str, Path],
    kind: str,
    asked: str,
    nothing_is_loaded: None,
) -> None:
    with pytest.raises(LoraError, match=f"quantize is '{asked}', but '{stored[kind]}' is stored in {kind}"):
        run(recipe(model=str(stored[kind]), quantize=asked))


def test_an_unknown_quantization(base: Path) -> None:
    with pytest.raises(LoraError, match="quantize is 'int4'; allowed: none, nf4, int8"):
        load_base(str(base), torch.float32, "int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "nf4"}, "quantize is 'nf4', which needs bitsandbytes"),
        ({"optimizer": "adamw_8bit"}, "optimizer is 'adamw_8bit', which needs bitsandbytes"),
        ({"optimizer": "paged_adamw"}, "optimizer is 'paged_adamw', which needs bitsandbytes"),
        ({"model": "STORED"}, "model: '.*' is stored in int8, which needs bitsandbytes"),
    ],
)
def test_without_bitsandbytes_it_says_what_to_install(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_is_loaded: None,
    changes: dict[str, Any],
    message: str,
) -> None:
    if "model" in changes:
        settings = {
            "model_type": "llama",
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        }
        (tmp_path / "config.json").write_text(json.dumps(settings))
        changes = {"model": str(tmp_path)}
    monkeypatch.setattr("lora.bases.bitsandbytes.find_spec", lambda name: None)
    with pytest.raises(LoraError, match=message + r"; pip install 'lora-torch\[quant\]'"):
        run(recipe(**changes))


def optimizer_of(monkeypatch: pytest.MonkeyPatch, plan: Recipe) -> Any:
    """The optimizer that a run of this recipe used."""
    seen: list[Any] = []
    end = Watch.on_train_end
    monkeypatch.setattr(Watch, "on_train_end", lambda *a, **k: (seen.append(k["optimizer"]), end(*a, **k))[1])
    run(plan, force=True)
    return seen[0].optimizer


def test_the_default_optimizer_is_torchs(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_of(monkeypatch, recipe())
    assert record_of(Path(recipe().out))["quantisation"] is None
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]


def test_states_in_8_bits(bnb: ModuleType, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    # A of 128 x 32 is the smallest that bitsandbytes holds in 8 bits.
    optimizer = optimizer_of(monkeypatch, recipe(optimizer="adamw_8bit", r=128, weight_decay=0.5))
    assert isinstance(optimizer, bnb.optim.AdamW)
    kinds = {state["state1"].dtype for state in optimizer.state.values()}
    assert torch.uint8 in kinds
    assert {group["weight_decay"] for group in optimizer.param_groups} >= {0.5}


def test_an_optimizer_that_cannot_run_is_told_before_anything_is_loaded(
    bnb: ModuleType, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, nothing_is_loaded: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoraError, match="'paged_adamw'.* there is no GPU; allowed here: adamw, adamw_8bit"):
        run(recipe(optimizer="paged_adamw"))

    def step(*_: Any) -> None:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(bnb.optim.AdamW, "step", step)
    with pytest.raises(LoraError, match="'adamw_8bit', which the installed.*no kernel for this device.*or use adamw"):
        run(recipe(optimizer="adamw_8bit"))


def test_what_transformers_is_told(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    length = Length(4, 2, 0, 1)
    paged = trainer.arguments(recipe(optimizer="paged_adamw", liger=True), length, tmp_path)
    assert (paged.optim, paged.use_liger_kernel) == ("paged_adamw_32bit", True)
    assert not trainer.arguments(recipe(), length, tmp_path).use_liger_kernel


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": True, "offload": True}, "offload"),
    ],
)
def test_prepare_is_told_of_the_checkpoints(
    bnb: ModuleType,
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    expected: bool | str,
) -> None:
    told: list[Any] = []

    def prepare(model: Any, *, checkpointing: Any) -> Any:
        told.append(checkpointing)
        return model

    monkeypatch.setattr(lora, "prepare", prepare)
    adapted(recipe(quantize="nf4", **changes))
    assert told == [expected]


@pytest.mark.parametrize(
    ("changes", "gpu", "message"),
    [
        ({"offload": True, "gradient_checkpointing": True}, False, "offload: .* there is no GPU"),
        ({"liger": True}, False, "liger: its kernels run on a GPU, and there is none"),
        ({"liger": True}, True, r"liger: it needs liger_kernel; pip install 'lora-torch\[fast\]'"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_loaded(
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    nothing_is_loaded: None,
    changes: dict[str, Any],
    gpu: bool,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(needs_module, "find_spec", lambda name: None if gpu else object())
    with pytest.raises(LoraError, match=message):
        run(recipe(**changes))


def test_liger_that_would_do_nothing_or_leave_an_adapter_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its list of models; its kernels need a GPU."""
    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    needs_module.check_liger(lora.inject(tiny_llama(), targets="all-linear"))
    with pytest.raises(LoraError, match="its loss reads the weight of 'lm_head' without calling it"):
        needs_module.check_liger(lora.inject(tiny_llama(), targets=["q_proj", "lm_head"]))
    known.MODEL_TYPE_TO_APPLY_LIGER_FN = {"gemma": None}
    with pytest.raises(LoraError, match="it has no kernels for a model of type 'llama'"):
        needs_module.check_liger(lora.inject(tiny_llama(), targets="all-linear"))


def test_bitsandbytes_remarks_are_kept_back_for_the_time_only() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with quiet():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert logger.isEnabledFor(logging.WARNING)
