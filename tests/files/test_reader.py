"""One reader: what `lora inspect` calls damaged, `lora.load` refuses, with the same words, and the reverse."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from conftest import randomize
from lora import LoraError
from lora.files.adapter import read
from lora.files.description import describe
from lora.files.header import read_header
from lora.files.writing import write

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """In a folder of its own: other tests' adapters lie beside tmp_path."""
    lora.save(randomize(lora.inject(net(), r=1, targets=["0", "1"])), tmp_path / "adapter")
    return tmp_path / "adapter"


def by_inspect(folder: Path) -> str | None:
    """The error's words, "see above" for damage that the table tells, or None."""
    try:
        return "see above" if describe(folder).damaged else None
    except LoraError as error:
        return str(error)


def by_load(folder: Path) -> str | None:
    try:
        lora.load(net(), folder)
    except LoraError as error:
        return str(error)
    return None


def header_of(raw: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A file with another header, without a checksum that would tell."""

    def damage(folder: Path) -> None:
        header, data = header_of((folder / TENSORS).read_bytes())
        del header["__metadata__"]
        change(header)
        text = json.dumps(header).encode()
        (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def first(**changes: object) -> Callable[[Path], None]:
    return with_header(lambda header: header[min(header)].update(changes))


def swap(header: dict) -> None:
    """Two tensors on the same bytes, and a gap where one of them was."""
    one, other = sorted(header)[:2]
    header[one]["data_offsets"] = header[other]["data_offsets"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no config": lambda f: (f / CONFIG).unlink(),
    "no JSON": lambda f: (f / CONFIG).write_text("{"),
    "no text": lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"),
    "deep JSON": lambda f: (f / CONFIG).write_text("[" * 100_000),
    "a list": lambda f: (f / CONFIG).write_text("[]"),
    "another method": lambda f: (f / CONFIG).write_text('{"peft_type": "IA3"}'),
    "no method": lambda f: (f / CONFIG).write_text('{"r": 1}'),
    "no tensors": lambda f: (f / TENSORS).unlink(),
    "a pickle": lambda f: (f / TENSORS).rename(f / "adapter_model.bin"),
    "empty": lambda f: (f / TENSORS).write_bytes(b""),
    "a byte more": lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes() + b"\0"),
    "a byte less": lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]),
    "no header": lambda f: (f / TENSORS).write_bytes(b"\2\0\0\0\0\0\0\0[]"),
    "another shape": first(shape=[3, 1]),
    "a shape of text": first(shape=["4", 1]),
    "a negative shape": first(shape=[-4, -1]),
    "another dtype": first(dtype="F16"),
    "a dtype of a list": first(dtype=["F32"]),
    "a gap": with_header(swap),
    "metadata of numbers": with_header(lambda header: header.update(__metadata__={"format": 1})),
    "metadata of a list": with_header(lambda header: header.update(__metadata__=["pt"])),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_told_in_the_same_words(folder: Path, damage: str) -> None:
    assert by_inspect(folder) is by_load(folder) is None
    DAMAGES[damage](folder)
    told = by_inspect(folder)
    assert told not in (None, "see above")
    assert by_load(folder) == told


def test_any_changed_byte_is_seen_by_both(folder: Path) -> None:
    raw = (folder / TENSORS).read_bytes()
    for place in range(0, len(raw), 23):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 7
        (folder / TENSORS).write_bytes(damaged)
        assert by_inspect(folder) is not None, place
        assert by_load(folder) is not None, place


def test_half_an_update_is_seen_by_both(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    del tensors["base_model.model.1.lora_B.weight"]
    save_file(tensors, folder / TENSORS)
    assert by_inspect(folder) == "see above"
    assert "tensors missing: base_model.model.1.lora_B.weight" in str(by_load(folder))


def test_a_wrong_folder_is_told_in_the_same_words(folder: Path) -> None:
    for path, words in (
        (folder / "gone", "does not exist"),
        (folder.parent, f"there is one in {folder}"),
        (folder / CONFIG, f"has no {CONFIG}"),
    ):
        assert words in str(by_inspect(path))
        assert by_load(path) == by_inspect(path)


def test_what_safetensors_writes_the_header_reads(tmp_path: Path) -> None:
    """Every dtype of an adapter or of a module trained whole, empty tensors and scalars."""
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]
    tensors = {str(i): torch.zeros(2, 3).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x", {"format": "pt"})
    with (tmp_path / "x").open("rb") as source:
        entries, metadata, raw = read_header(source, tmp_path / "x", (tmp_path / "x").stat().st_size)
    assert (tmp_path / "x").read_bytes().startswith(raw)
    assert metadata == {"format": "pt"}
    assert {key: entry.shape for key, entry in entries.items()} == {k: tuple(t.shape) for k, t in tensors.items()}
    names = {key: entry.dtype for key, entry in entries.items()}
    assert names.pop(str(len(kinds) - 1)) == "f8_e4m3"  # one that no adapter has is named as the file has it
    assert names == {key: str(tensors[key].dtype).removeprefix("torch.") for key in names}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tied = torch.arange(6.0).view(2, 3)
    tensors = {"a": tied, "b": tied.t(), "c": tied[0]}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1e-3}
    write(tmp_path / "new" / "folder", config, tensors, {"x": "a text"})
    found = read(tmp_path / "new" / "folder")
    assert (found.config, found.metadata["x"], found.verified, found.paired) == (config, "a text", True, True)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in found.tensors().items())
    (tmp_path / "new" / "folder" / CONFIG).write_text(json.dumps({**config, "r": 3}))
    assert not read(tmp_path / "new" / "folder").paired


def test_inspect_names_an_update_that_is_not_plain(folder: Path) -> None:
    assert "update" not in str(describe(folder))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "lora_update": "mine", "use_rslora": True}))
    assert "settings: r 1, alpha 2, dropout 0.0, rsLoRA, update mine\n" in str(describe(folder))


def test_reading_needs_no_torch(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from lora.files import adapter, commit, description, header, settings
str(description.describe(Path({str(folder)!r})))
settings.from_peft(adapter.read(Path({str(folder)!r})).config, "here")
assert not {{"torch", "safetensors", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
