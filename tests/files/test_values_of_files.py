"""What a file's tensors may be: bytes that every reader takes, finite values, dtypes, a vocabulary of another size."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from conftest import randomize, refused, same_bits, tiny_llama
from lora import LoraError, LoraWarning
from lora.files.adapter import read
from lora.files.writing import write
from said import said
from small_adapter import TENSORS, made, net


def rewrite(folder: Path, **changes: Tensor) -> None:
    """The tensors as PEFT writes them, some of them others; `A0` is the first module's A."""
    tensors = load_file(folder / TENSORS)
    for name, value in changes.items():
        tensors[f"base_model.model.{name[1]}.lora_{name[0]}.weight"] = value
    save_file(tensors, folder / TENSORS, {"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_adapter_is_refused_at_save_and_at_load_unless_asked_for(value: float, tmp_path: Path) -> None:
    model = made(1, 3)
    with torch.no_grad():
        model[1].lora["default"].B[3, 1] = value
    with pytest.raises(LoraError, match=r"adapter 'default' has values that are NaN or infinite: .*1\.lora_B.*check=F"):
        lora.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    lora.save(model, tmp_path / "a", check=False)
    fresh = net()
    refused(
        lambda: lora.load(fresh, tmp_path / "a"), fresh, r"1 of its tensors hold NaN or infinite .*1\.lora_B.*check="
    )
    again = lora.load(fresh, tmp_path / "a", check=False)
    assert torch.equal(again[1].lora["default"].B, model[1].lora["default"].B) or math.isnan(value)
    lora.merge(made(1, 3))
    with pytest.raises(LoraError, match="NaN or infinite"):
        lora.save(again, tmp_path / "b")


def test_nan_adapter_that_is_damaged_is_told_as_damage(tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    raw = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(raw[:-4] + struct.pack("<f", math.nan))
    with pytest.raises(LoraError, match="checksum"):
        lora.load(net(), tmp_path)


def test_a_buffer_of_infinities_is_no_nan_adapter(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
            self.head.register_buffer("mask", torch.full((3,), -math.inf))

    lora.save(lora.inject(Masked(), r=2, targets=["q"], train=["head"]), tmp_path)
    assert torch.isinf(lora.load(Masked(), tmp_path).head.lora["default"].module.mask).all()


def test_f64_adapter_is_rounded_with_a_warning(tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    A = torch.rand(2, 6, dtype=torch.float64)
    rewrite(tmp_path, A0=A)
    with pytest.warns(LoraWarning, match=r"1 of its tensors are float64 and are rounded: .*0\.lora_A") as told:
        model = lora.load(net(), tmp_path)
    assert len(told) == 1 and told[0].filename == __file__
    assert torch.equal(model[0].lora["default"].A, A.float())
    rewrite(tmp_path, A0=A * 1e300)  # which fp32 has no room for
    fresh = net()
    refused(lambda: lora.load(fresh, tmp_path), fresh, "NaN or infinite values: .*0.lora_A")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_widened_without_a_word(dtype: torch.dtype, tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    A = torch.rand(2, 6).to(dtype)
    rewrite(tmp_path, A0=A)
    assert torch.equal(lora.load(net(), tmp_path)[0].lora["default"].A, A.float())


# PEFT's files with the embedding and the head in them


def resized(rows: int, **changes: object) -> nn.Module:
    model = tiny_llama(**changes)
    model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_peft_vocabulary_says_to_resize_first_and_then_loads(tied: bool, tmp_path: Path, ids: Tensor) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    theirs = peft.get_peft_model(resized(101, tie_word_embeddings=tied), config)
    with torch.no_grad():  # the new rows have values of their own
        theirs.get_input_embeddings().weight[97:].normal_()
    randomize(theirs).eval().save_pretrained(tmp_path, save_embedding_layers=True)
    ids = ids + 4
    model = tiny_llama(tie_word_embeddings=tied)
    words = r"has 101 rows, and the model's has 97: .*model.resize_token_embeddings\(101\) first, then lora.load"
    refused(lambda: lora.load(model, tmp_path), model, words)
    again = resized(101, tie_word_embeddings=tied)
    with torch.no_grad():
        again.get_input_embeddings().weight[97:].fill_(0.5)
    with pytest.warns(LoraWarning, match=r"embed_tokens.* taken for modules that were trained whole"):
        lora.load(again, tmp_path)
    assert torch.allclose(again(ids).logits, theirs(ids).logits, atol=1e-5)
    lora.save(again, tmp_path / "ours")
    once_more = lora.load(resized(101, tie_word_embeddings=tied), tmp_path / "ours", check=False)
    assert torch.equal(once_more(ids).logits, again(ids).logits)


def test_peft_vocabulary_of_another_module_is_still_unexpected(tmp_path: Path) -> None:
    lora.save(randomize(lora.inject(tiny_llama(), r=2, targets=["q_proj"])), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.model.layers.0.self_attn.k_proj.weight"] = torch.ones(24, 48)
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    model = tiny_llama()
    refused(lambda: lora.load(model, tmp_path), model, r"1 unexpected: .*k_proj\.weight")


def test_a_copy_of_what_is_on_the_meta_device_is_left_out_with_a_word(tmp_path: Path) -> None:
    lora.save(randomize(lora.inject(tiny_llama(), r=2, targets=["q_proj"])), tmp_path)
    key = "base_model.model.model.embed_tokens.weight"
    model = tiny_llama()
    tensors = {**load_file(tmp_path / TENSORS), key: torch.ones(model.model.embed_tokens.weight.shape)}
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    model.model.embed_tokens.to("meta")
    with said(f"{key} are left out as copies of the base's, which is on the meta device"):
        lora.load(model, tmp_path, check=False)


def test_a_tied_pair_needs_one_of_its_names_in_the_file(tmp_path: Path) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    lora.inject(tied, r=2, targets=["q_proj"], train=["embed_tokens", "lm_head"])
    lora.save(randomize(tied), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    table = tensors["base_model.model.model.embed_tokens.weight"]
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    again = lora.load(tiny_llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(again.lm_head.weight, table) and torch.equal(again.model.embed_tokens.weight, table)


# Bytes


def test_what_we_write_is_what_safetensors_would_read_and_write(tmp_path: Path) -> None:
    """Every dtype of an adapter or of a module trained whole, empty tensors, scalars, views, ties, names in Unicode."""
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool]
    tensors = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    tied = torch.arange(12.0).view(3, 4)
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "tied": tied,
        "turned": tied.t(),
        "row": tied[1],
    }
    tensors |= {'ä " \\ 名': torch.ones(1, dtype=torch.int8), "grad": torch.ones(3, requires_grad=True)}
    write(tmp_path, {"peft_type": "LORA"}, tensors, {"x": "0" * 64, "lora.base": "ä"})
    plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    assert same_bits(load_file(tmp_path / TENSORS), plain)
    assert same_bits(read(tmp_path).tensors(), plain)
    assert read(tmp_path).verified is True
    raw = (tmp_path / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    end = 0
    for key, entry in header.items():  # in the order of the data, each at a multiple of its elements' size
        assert entry["data_offsets"][0] == end
        assert end % tensors[key].element_size() == 0
        end = entry["data_offsets"][1]
    assert len(raw) == 8 + length + end


def test_a_dtype_that_no_adapter_has_is_refused_both_ways(tmp_path: Path) -> None:
    odd = {"a": torch.zeros(2).to(torch.float8_e4m3fn)}
    with pytest.raises(LoraError, match="a is float8_e4m3fn; a file of an adapter holds float64"):
        write(tmp_path / "x", {"peft_type": "LORA"}, odd, {})
    assert not list((tmp_path / "x").iterdir())
    lora.save(made(1, 3), tmp_path)
    rewrite(tmp_path, A0=torch.zeros(2, 6).to(torch.float8_e4m3fn))
    model = net()
    refused(lambda: lora.load(model, tmp_path), model, r"0\.lora_A")


PEAK = """
import sys, resource, torch, lora
from torch import nn
torch.set_num_threads(1)
layers, wide, r = 24, 4096, 128  # 24 x (2 + 2) MiB
model = nn.Sequential(*[nn.Linear(wide, 4, bias=False) for _ in range(layers)])
small = nn.Sequential(nn.Linear(4, 4))
lora.save(lora.inject(small, r=1, targets=["0"]), sys.argv[1] + "/small")
lora.load(nn.Sequential(nn.Linear(4, 4)), sys.argv[1] + "/small", check=False)
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
lora.inject(model, r=r, targets="all-linear")
before = now(); open("/proc/self/clear_refs", "w").write("5")
lora.save(model, sys.argv[1])
print("save", peak() - before)
lora.remove(model)
import ctypes, gc; gc.collect(); ctypes.CDLL(None).malloc_trim(0)
before = now(); open("/proc/self/clear_refs", "w").write("5")
lora.load(model, sys.argv[1])
print("load", peak() - before)
"""


def test_save_takes_one_tensor_of_memory_and_load_the_adapter_and_one(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    took = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    size, tensor, slack = (tmp_path / TENSORS).stat().st_size, 128 * 4096 * 4, 6 << 20
    assert size > 24 * tensor
    assert took["save"] < tensor + slack, took
    assert took["load"] < size + tensor + slack, took
