"""Bases that must not be loaded: code of their own, and files that do not fit their config."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora import LoraError
from lora.train.base import load_base, load_config, load_tokenizer
from said import said
from tiny_base import save_tiny_base

Variant = Callable[..., Path]
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("refused"))


@pytest.fixture
def variant(base: Path, tmp_path: Path) -> Variant:
    """The base with other fields in one of its json files."""

    def make(file: str = "config.json", **changes: Any) -> Path:
        shutil.copytree(base, tmp_path / "v")
        path = tmp_path / "v" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return tmp_path / "v"

    return make


@pytest.mark.parametrize("load", [load_config, lambda name: load_base(name, torch.float32)])
def test_remote_code_of_a_base_is_refused_and_never_asked_for(
    variant: Variant, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = variant(model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text(CODE)
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    with pytest.raises(LoraError, match=r"brings code of its own \(auto_map\), which is never run here") as caught:
        load(str(folder))
    assert caught.value.exit_code == 2
    assert answers.tell() == 0 and not (folder / "ran").exists()


def test_remote_code_of_a_tokenizer_is_refused(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = variant("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}, tokenizer_class="T")
    (folder / "code.py").write_text(CODE)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(LoraError, match="the tokenizer of .* brings code of its own"):
        load_tokenizer(str(folder))
    assert not (folder / "ran").exists()


def test_remote_code_beside_a_known_kind_is_not_run_and_said(variant: Variant) -> None:
    folder = variant(auto_map={"AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text(CODE)
    with said("code of its own, which is not run: it is transformers' LlamaForCausalLM"):
        load_base(str(folder), torch.float32)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 64}, "other shapes than its config asks for"),
        ({"hidden_size": 10**12}, "other shapes than its config asks for"),
        ({"num_hidden_layers": 3}, "lacks 9 weights that its config asks for"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"num_attention_heads": 0}, "could not be loaded"),
    ],
    ids=["wide", "huge", "deep", "word", "zero"],
)
def test_deep_inputs_a_config_that_does_not_fit_its_weights(variant: Variant, changes: Any, told: str) -> None:
    with pytest.raises(LoraError, match=f"^model: .*{told}"):
        load_base(str(variant(**changes)), torch.float32)


def test_weights_that_nothing_asks_for_are_said(variant: Variant) -> None:
    with said("9 weights that its config does not ask for"):
        load_base(str(variant(num_hidden_layers=1)), torch.float32)


@pytest.mark.parametrize("size", [0, 7, 20_000])
def test_deep_inputs_truncated_base_weights(variant: Variant, size: int) -> None:
    folder = variant()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(LoraError, match=r"^model: .* could not be loaded"):
        load_base(str(folder), torch.float32)
