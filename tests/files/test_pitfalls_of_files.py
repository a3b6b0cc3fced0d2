"""One test for each fault of other tools with an adapter's files, named after the fault."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora
from conftest import randomize, refused, tiny_llama
from lora import LoraError
from lora.layers import hosts

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def saved(folder: Path, seed: int = 1, **changes: object) -> Path:
    """An adapter of tiny_llama on disk."""
    model = tiny_llama()
    lora.inject(model, **{"r": 4, "targets": ["q_proj", "v_proj"], **changes})
    lora.save(randomize(model, seed=seed), folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors as another tool would, leaving no record of ours in the header."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


def test_half_of_an_adapters_keys_missing(tmp_path: Path) -> None:
    saved(tmp_path)

    def halve(tensors: dict[str, Tensor]) -> None:
        for key in sorted(tensors)[::2]:
            del tensors[key]

    rewrite(tmp_path, halve)
    model = tiny_llama()
    refused(lambda: lora.load(model, tmp_path), model, r"6 of the adapter's tensors missing")
    refused(lambda: lora.load(model, tmp_path, check=False), model, "missing")


def test_unexpected_keys_are_dropped(tmp_path: Path) -> None:
    saved(tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] = torch.zeros(4, 48)

    rewrite(tmp_path, add)
    model = tiny_llama()
    refused(lambda: lora.load(model, tmp_path), model, r"unexpected.*k_proj\.lora_A")
    refused(lambda: lora.load(model, tmp_path, check=False), model, "unexpected")


def test_adapter_of_another_base_with_the_same_shapes(tmp_path: Path) -> None:
    saved(tmp_path)
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.02)
    refused(lambda: lora.load(model, tmp_path), model, r"another base.*check=False")
    lora.load(model, tmp_path, check=False)
    assert len(list(hosts(model))) == 6


def test_one_bit_flipped_in_a_file(tmp_path: Path) -> None:
    raw = (saved(tmp_path) / TENSORS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    model = tiny_llama()
    for place in [start, start + 1, (start + len(raw)) // 2, len(raw) - 1]:
        for bit in (0, 7):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << bit
            (tmp_path / TENSORS).write_bytes(damaged)
            refused(lambda: lora.load(model, tmp_path), model, "checksum")
            refused(lambda: lora.load(model, tmp_path, check=False), model, "checksum")
    (tmp_path / TENSORS).write_bytes(raw)
    lora.load(model, tmp_path)


@pytest.mark.parametrize(
    "name", ["/tmp/evil", "../x", "..", ".", "", "a/b", "a\\b", "a.b", "a b", "ä", "x" * 65, "a\n", None, 3]
)
def test_adapter_named_with_a_path_writes_outside_the_folder(name: object, tmp_path: Path) -> None:
    folder = saved(tmp_path / "in" / "adapter")
    model = tiny_llama()
    refused(lambda: lora.inject(model, targets=["q_proj"], name=name), model, "^name")
    refused(lambda: lora.load(model, folder, name=name), model, "^name")
    lora.load(model, folder)
    if name is not None:
        refused(lambda: lora.save(model, tmp_path / "out", name=name), model, "^name")
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([CONFIG, TENSORS, "adapter", "in"])
    assert not (tmp_path / "out").exists()


def test_second_adapter_loaded_and_the_wrong_one_is_trainable(tmp_path: Path) -> None:
    saved(tmp_path)
    model = tiny_llama()
    lora.inject(model, r=4, targets=["q_proj"], name="mine")

    def trainable() -> set[str]:
        return {n.split(".lora.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}

    assert trainable() == {"mine"}
    lora.load(model, tmp_path, name="theirs")
    assert trainable() == {"mine"}
    assert lora.summary(model).acting == ["theirs"]
    lora.activate(model, ["mine", "theirs"])
    assert trainable() == {"mine"}
    lora.load(model, tmp_path, name="more", trainable=True)
    lora.activate(model, None)
    assert trainable() == {"mine", "more"}
    lora.remove(model, "mine")
    assert trainable() == {"more"}


def test_loading_the_20th_adapter_is_slower_than_the_first(tmp_path: Path) -> None:
    saved(tmp_path, targets="all-linear")
    model = tiny_llama()
    calls = []  # not seconds: a shared machine's clock would pass a slow growth, or fail without one

    def count(frame: object, event: str, argument: object) -> None:
        calls[-1] += event in ("call", "c_call")

    for index in range(21):
        calls.append(0)
        sys.setprofile(count)
        try:
            lora.load(model, tmp_path, name=f"a{index}")
        finally:
            sys.setprofile(None)
    assert calls[20] < 1.01 * calls[1], calls


def test_a_save_of_partial_adapters(tmp_path: Path) -> None:
    """Parameters without values (meta here; an unsharded rank elsewhere) are refused, and no file appears."""
    model = tiny_llama()
    lora.inject(model, r=4, targets=["q_proj"])
    *_, (_, _, last) = hosts(model)
    last["default"].to("meta")
    with pytest.raises(LoraError, match="meta"):
        lora.save(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_config_written_by_hand_with_a_damaged_value(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    model = tiny_llama()
    for key, value in (("r", 8), ("r", 0), ("r", "4"), ("lora_alpha", -1), ("rank_pattern", []), ("target_modules", 5)):
        (tmp_path / CONFIG).write_text(json.dumps({**config, key: value}))
        refused(lambda: lora.load(model, tmp_path), model, str(tmp_path / CONFIG) + "|" + str(tmp_path))
