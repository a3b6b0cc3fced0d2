"""An adapter's file between quantized and dense bases, and in PEFT's hands."""

import warnings
from pathlib import Path

import peft
import pytest
import torch

import lora
from conftest import tiny_llama, unchanged
from quantized_base import KINDS, SIZES, adapted, distance, llama, tokens

NAMES = {None: "bfloat16, not quantized", "nested nf4": "double-quantized nf4"}


@pytest.mark.parametrize("there", [None, *KINDS])
@pytest.mark.parametrize("here", [None, *KINDS])
def test_an_adapter_on_its_base_quantized_otherwise_is_a_warning(
    there: str | None, here: str | None, tmp_path: Path
) -> None:
    model = adapted(there)
    lora.save(model, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = lora.load(llama(here), tmp_path)
    texts = [str(w.message) for w in caught if issubclass(w.category, lora.LoraWarning)]
    if there == here:
        assert not texts
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    else:
        (text,) = texts
        assert f"in {NAMES.get(there, there)}, and this one is in {NAMES.get(here, here)};" in text
        assert Path(caught[-1].filename).name == Path(__file__).name


@pytest.mark.parametrize("here", [None, *KINDS])
def test_an_adapter_of_another_base_is_refused(here: str | None, tmp_path: Path) -> None:
    other = tiny_llama(**SIZES)
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0)
    other.save_pretrained(tmp_path / "base")
    lora.save(adapted("nf4"), tmp_path / "adapter")
    model = llama(here, path=tmp_path / "base")
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error", lora.LoraWarning)  # not first a warning that says that it will act
        with pytest.raises(lora.LoraError, match="another base: .* sampled weights differ"):
            lora.load(model, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
def test_the_same_base_quantized_from_another_dtype_warns(kind: str, tmp_path: Path) -> None:
    lora.save(adapted(kind, torch.bfloat16), tmp_path)
    with pytest.warns(lora.LoraWarning, match="sampled weights differ.*each by little: .*from another dtype"):
        lora.load(llama(kind, torch.float32), tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_loads_our_file_onto_a_quantized_base(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, torch.float32)
    lora.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(llama(kind, torch.float32), tmp_path).train()
    assert distance({"": other(tokens()).logits.detach()}, {"": model(tokens()).logits.detach()}) < 1e-5
