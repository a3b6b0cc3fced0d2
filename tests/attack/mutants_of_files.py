"""Mutants of an adapter's two files: bytes, the header's structure, settings, and what stands in a file's place."""

import json
import os
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacked_adapters import CONFIG, TENSORS, Original
from header_mutations import HEADER, Draft, scrambled
from hostile_values import MARK, VALUES, as_text, hostile

SPARSE = 10 << 30


@dataclass
class Mutant:
    """files: bytes, or what makes something else in a file's place; a file that is not there is missing.

    like: the loaded effect that a sealed file may have. kind: "sealed" while the seal is the writer's, "sealed anew"
    where the attacker made one, "unsealed" without one, as PEFT's files and ours without their metadata.
    """

    what: str
    kind: str
    like: str
    files: dict[str, bytes | Callable[[Path], None]]
    data_changed: bool = False


# Settings


def keys_of_config(original: Original) -> list[str]:
    more = ["lora_update", "use_dora", "use_rslora", "target_parameters", "layer_replication", "base_layer", "unknown"]
    return sorted({*json.loads(original.config), *more})


def with_setting(config: bytes, key: str, value: str) -> bytes:
    return as_text({**json.loads(config), key: MARK + value}).encode()


def other_config(rng: random.Random, original: Original) -> bytes:
    way, config = rng.randrange(8), original.config
    if way < 4:
        for _ in range(rng.randint(1, 3)):
            known = json.loads(original.config)
            known[rng.choice(keys_of_config(original))] = hostile(rng)
            config = as_text(known).encode()
        return config
    if way == 4:
        known = json.loads(config)
        del known[rng.choice(list(known))]
        return json.dumps(known).encode()
    if way == 5:
        return rng.choice(VALUES).encode()
    if way == 6:  # a key twice
        return (
            config.rstrip()[:-1]
            + f", {json.dumps(rng.choice(keys_of_config(original)))}: {rng.choice(VALUES)}}}".encode()
        )
    text = config.decode()
    return rng.choice([b"\xef\xbb\xbf" + config, text.encode("utf-16"), config + b"\0", config * 2, b"\xff" + config])


# What stands in a file's place


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its address is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def _sparse(raw: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(raw)
        os.truncate(path, SPARSE)

    return make


def sparse_tensor(original: Original) -> Callable[[Path], None]:
    """10 GiB of zeros with a header that says so, which takes no place on the disk."""
    header, _ = original.parts()
    key = next(key for key in header if key != "__metadata__")
    one = {"dtype": "F32", "shape": [1 << 20, 2560], "data_offsets": [0, SPARSE]}
    text = json.dumps({"__metadata__": header["__metadata__"], key: one}).encode()

    def make(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + SPARSE)

    return make


def places(original: Original) -> dict[str, dict[str, bytes | Callable[[Path], None] | None]]:
    """What to put in the place of which file; None takes it away."""
    assert original.other is not None
    found: dict[str, dict[str, bytes | Callable[[Path], None] | None]] = {}
    for file, raw in ((CONFIG, original.config), (TENSORS, original.tensors)):
        found |= {
            f"{file} missing": {file: None}, f"{file} empty": {file: b""}, f"{file} sparse": {file: _sparse(raw)},
            f"{file} a directory": {file: lambda path: path.mkdir()},
            f"{file} a fifo": {file: lambda path: os.mkfifo(path)}, f"{file} a socket": {file: _socket},
            f"{file} a link to itself": {file: lambda path: path.symlink_to(path.name)},
            f"{file} a dangling link": {file: lambda path: path.symlink_to("nowhere")},
            f"{file} a link to /dev/zero": {file: lambda path: path.symlink_to("/dev/zero")},
            f"{file} a pickle": {file: b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03."},
        }  # fmt: skip
    found["tensors of 10 GiB"] = {TENSORS: sparse_tensor(original)}
    found["another save's settings"] = {CONFIG: original.other.config}
    found["another save's tensors"] = {TENSORS: original.other.tensors}
    found["the files swapped"] = {CONFIG: original.tensors, TENSORS: original.config}
    found["a header of 2**63 bytes"] = {TENSORS: struct.pack("<Q", 1 << 63) + original.tensors[8:]}
    return found


# Directed and random mutants


def directed(originals: list[Original]) -> list[tuple[Original, str, Any]]:
    """Every setting, the metadata and every value of its records by every hostile value; all things in all places."""
    found: list[tuple[Original, str, Any]] = []
    for original in originals:
        found += [(original, "setting", (key, value)) for key in keys_of_config(original) for value in VALUES]
        found += [(original, "place", place) for place in places(original)]
        found += [(original, "metadata", value) for value in VALUES]
        found += [(original, "record", (name, key, v)) for name, key in records(original) for v in VALUES]
    return found


def records(original: Original) -> list[tuple[str, str]]:
    """(name, key) of each value of each text of the metadata that holds a JSON object."""
    texts = Draft.of(original).metadata() or {}
    return [(name, key) for name, text in texts.items() if text.startswith("{") for key in json.loads(text)]


def made(case: tuple[Original, str, Any]) -> Mutant:
    original, what, detail = case
    files: dict[str, bytes | Callable[[Path], None]] = {CONFIG: original.config, TENSORS: original.tensors}
    kind = "sealed" if original.sealed else "unsealed"
    if what == "setting":
        files[CONFIG] = with_setting(original.config, *detail)
        return Mutant(f"{detail[0]} = {detail[1][:60]}", kind, original.effect, files)
    if what in ("metadata", "record"):
        draft = Draft.of(original)
        texts = draft.metadata() or {}
        if what == "metadata":
            draft.pairs = [[key, MARK + detail if key == "__metadata__" else value] for key, value in draft.pairs]
        else:
            name, key, value = detail
            texts[name] = as_text({**json.loads(texts[name]), key: MARK + value})
        kind = "sealed anew" if what == "record" else "unsealed"
        files[TENSORS] = draft.tensors(seal=what == "record")
        return Mutant(f"{what} {str(detail)[:60]}", kind, original.effect, files)
    changes = places(original)[detail]
    files = {file: made for file, made in {**files, **changes}.items() if made is not None}
    assert original.other is not None
    like = original.other.effect if "another save's tensors" in detail else original.effect
    return Mutant(detail, kind, like, files, data_changed=TENSORS in changes)


def drawn(rng: random.Random, original: Original) -> Mutant:
    """A random mutant: of bytes, of the header's structure, of the settings, or of several."""
    draft, way = Draft.of(original), rng.randrange(10)
    length = 8 + struct.unpack("<Q", original.tensors[:8])[0]
    kind = "sealed" if original.sealed else "unsealed"
    before = bytes(draft.data)
    if way < 3:
        first, last = rng.choice([(0, 8), (8, length), (8, length), (length, None), (0, None)])
        tensors = scrambled(rng, original.tensors, first, last)
        config = original.config if rng.random() < 0.8 else scrambled(rng, original.config)
        kind = kind if b'"lora.' in tensors else "unsealed"
        return Mutant("bytes", kind, original.effect, {CONFIG: config, TENSORS: tensors}, tensors[length:] != before)
    if way == 3:
        files = {CONFIG: scrambled(rng, original.config), TENSORS: original.tensors}
        return Mutant("bytes of the settings", kind, original.effect, files)
    changes = rng.choices(HEADER, k=rng.randint(1, 3)) if way < 8 or rng.random() < 0.3 else []
    for change in changes:
        change(rng, draft)
    config = original.config if way < 8 else other_config(rng, original)
    seal = original.sealed and bool(changes) and rng.random() < 0.7
    if seal and config != original.config and (texts := draft.metadata()):
        for key in ("lora.config", "lora.settings", "lora.replaces"):  # the attacker's settings are the only ones
            texts.pop(key, None)
    tensors = draft.tensors(seal) if changes else original.tensors
    what = ", ".join([change.__name__ for change in changes] + ["settings"] * (config != original.config))
    kind = "unsealed" if b'"lora.' not in tensors else "sealed anew" if seal else kind
    return Mutant(what, kind, original.effect, {CONFIG: config, TENSORS: tensors}, bytes(draft.data) != before)
