"""Mutants of an adapter's two files: bytes, the header's structure, settings, and what stands in a file's place."""

import hashlib
import json
import os
import random
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from attacked_adapters import BLANK, CHECKSUM, CONFIG, TENSORS, Original

SPARSE = 10 << 30
PATTERNS = [
    "(([a-z_.0-9]+)+)+!", "(.*)*x!", r"(\w|\w\w|[a-z._]+)*!", "(?=(.+)+!)q", "(a?){40}" * 40, "(" * 500 + ")" * 500,
    "((((.{1,900}){1,900}){1,900}){1,900})!", "(?P<a>.)(?P=a)*", "[", "*", "(?i)Q_PROJ", ".*", "",
]  # fmt: skip
STRINGS = [*PATTERNS, "x" * 1_000_000, "\0", "\ud800", "q_proj", "v_proj\n", "none", "../..", "%s{0}"]
# Values as JSON text, because Python's writer refuses some of them.
VALUES = [
    "null", "true", "false", "[]", "{}", "-1", "-0.0", "0", "1", "2.0", "3", "0.5", "1000000000", "1" + "0" * 30,
    "1" + "0" * 400, "1e30", "1e400", "-1e400", "5e-324", "NaN", "Infinity", "-Infinity", "9" * 5000, "[" * 1000 + "]" * 1000,
    "[" * 100_000 + "]" * 100_000, '{"a":' * 1000 + "1" + "}" * 1000, "[null]", '["q_proj", null]', '[["q_proj"]]',
    '{"q_proj": null}', '{"q_proj": 1000000000}', '{"q_proj": -1}', '{"q_proj": "4"}', '{"q_proj": 2, "q_proj": 3}',
    *map(json.dumps, STRINGS), *(json.dumps([text]) for text in STRINGS), *(json.dumps({text: 4}) for text in STRINGS),
    *(json.dumps([f"m{n}" for n in range(n)]) for n in (1000, 50_000)), "[1, 0]", "[1000000000]",
]  # fmt: skip
MARK = "\x01"
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "",
    "f32",
    "F" * 5000,
]


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


@dataclass
class Draft:
    """An adapter taken apart; `pairs` are the header's keys and values, as objects or, behind a mark, as JSON text."""

    original: Original
    pairs: list[list[Any]]
    data: bytearray
    config: bytes
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, original: Original) -> "Draft":
        header, data = original.parts()
        return cls(original, [list(pair) for pair in header.items()], bytearray(data), original.config)

    def tensor(self, rng: random.Random) -> dict | None:
        """A tensor's entry, where one is left that is an object."""
        found = [value for key, value in self.pairs if key != "__metadata__" and isinstance(value, dict)]
        return rng.choice(found) if found else None

    def metadata(self) -> dict | None:
        return next((value for key, value in self.pairs if key == "__metadata__" and isinstance(value, dict)), None)

    def header(self) -> bytes:
        return ("{" + ",".join(f"{json.dumps(key)}:{as_text(value)}" for key, value in self.pairs) + "}").encode()

    def tensors(self, seal: bool) -> bytes:
        metadata = self.metadata()
        if seal and metadata is not None and CHECKSUM in metadata:
            metadata[CHECKSUM] = BLANK
        text = self.header()
        text += b" " * (-len(text) % 8)
        whole = struct.pack("<Q", len(text)) + text + self.data
        return whole.replace(BLANK.encode(), hashlib.sha256(whole).hexdigest().encode(), 1) if seal else whole


def as_text(value: Any) -> str:
    """JSON; a text behind the mark stands in it as it is, wherever it is."""
    found: list[str] = []

    def hold(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(MARK):
            found.append(value[1:])
            return f"{MARK}{len(found) - 1}{MARK}"
        if isinstance(value, dict):
            return {key: hold(each) for key, each in value.items()}
        return [hold(each) for each in value] if isinstance(value, list) else value

    return re.sub(r'"\\u0001(\d+)\\u0001"', lambda match: found[int(match[1])], json.dumps(hold(value)))


def hostile(rng: random.Random) -> str:
    return MARK + rng.choice(VALUES)


# Bytes


def scrambled(rng: random.Random, raw: bytes, first: int = 0, last: int | None = None) -> bytes:
    """One to four changes between two places: a bit, a byte, an insertion, a cut, a copy, zeros."""
    found = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        end = min(len(found), last if last is not None else len(found))
        if end <= first:
            break
        at, size = rng.randrange(first, end), rng.choice([1, 1, 2, 4, 8, 64])
        change = rng.randrange(7)
        if change == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            found[at] = rng.choice([0, 0x20, 0x22, 0x30, 0x5D, 0x7D, 0x7F, 0xFF, rng.randrange(256)])
        elif change == 2:
            found[at:at] = rng.randbytes(size)
        elif change == 3:
            del found[at : at + size]
        elif change == 4:
            other = rng.randrange(first, end)
            found[at : at + size] = found[other : other + size]
        elif change == 5:
            found[at : at + size] = bytes(size)
        else:
            del found[at:]
    return bytes(found)


# The header's structure


def a_dtype(rng: random.Random, draft: Draft) -> None:
    if entry := draft.tensor(rng):
        entry["dtype"] = rng.choice([*DTYPES, hostile(rng)])


def a_shape(rng: random.Random, draft: Draft) -> None:
    if (entry := draft.tensor(rng)) and isinstance(shape := entry.get("shape"), list):
        new = [list(reversed(shape)), [*shape, 1], [0], [], [-1, *shape[1:]], [1 << 62, 4], [1 << 64], hostile(rng)]
        entry["shape"] = rng.choice([*new, [hostile(rng), *shape[1:]], [rng.randrange(9) for _ in shape]])


def an_offset(rng: random.Random, draft: Draft) -> None:
    if (entry := draft.tensor(rng)) and isinstance(place := entry.get("data_offsets"), list) and len(place) == 2:
        begin, end = place
        new = [[end, begin], [begin, end + 4], [begin + 4, end], [0, 1 << 40], [-8, end], [begin], hostile(rng)]
        entry["data_offsets"] = rng.choice(
            [*new, [begin, hostile(rng)], [float(begin), end] if begin != MARK else place]
        )


def a_name(rng: random.Random, draft: Draft) -> None:
    pair = rng.choice(draft.pairs)
    name = str(pair[0])
    new = [rng.choice(STRINGS), name.replace("lora_A", "lora_B"), name.replace("layers.0", "layers.9"), name + ".x"]
    pair[0] = rng.choice([*new, name.upper(), name.replace("base_model.model.", ""), name[:-1], "__metadata__"])


def a_missing_tensor(rng: random.Random, draft: Draft) -> None:
    if len(draft.pairs) > 1:
        del draft.pairs[rng.randrange(len(draft.pairs))]


def a_second_key(rng: random.Random, draft: Draft) -> None:
    key, value = rng.choice(draft.pairs)
    draft.pairs.insert(rng.randrange(len(draft.pairs) + 1), [key, rng.choice([value, hostile(rng)])])


def two_swapped(rng: random.Random, draft: Draft) -> None:
    one, other = draft.tensor(rng), draft.tensor(rng)
    if one and other:
        for key in rng.choice([["data_offsets"], ["data_offsets", "shape"], ["shape"]]):
            one[key], other[key] = other.get(key), one.get(key)


def an_entry(rng: random.Random, draft: Draft) -> None:
    rng.choice(draft.pairs)[1] = hostile(rng)


def a_key_of_an_entry(rng: random.Random, draft: Draft) -> None:
    if entry := draft.tensor(rng):
        key = rng.choice([*entry, "extra"])
        entry.pop(key, None)
        if rng.random() < 0.6:
            entry[key] = hostile(rng)


def metadata(rng: random.Random, draft: Draft) -> None:
    found = draft.metadata()
    if found is None or rng.random() < 0.2:
        draft.pairs = [pair for pair in draft.pairs if pair[0] != "__metadata__"]
        if rng.random() < 0.7:
            draft.pairs.append(["__metadata__", hostile(rng)])
    else:
        key = rng.choice([*found, "lora.new", "lora.base", "lora.base"])
        found[key] = rng.choice([hostile(rng), rng.choice(STRINGS), rng.choice(VALUES), record(rng, found.get(key))])


def record(rng: random.Random, text: Any) -> str:
    """A text of the metadata that is JSON, with one hostile value in it."""
    try:
        known = json.loads(text)
    except (TypeError, ValueError):
        return rng.choice(VALUES)
    if isinstance(known, dict) and known:
        samples = known.get("samples")
        if isinstance(samples, list) and samples and rng.random() < 0.5:
            row = rng.choice(samples)
            row[rng.randrange(len(row))] = hostile(rng)
        else:
            known[rng.choice(list(known))] = hostile(rng)
    return as_text(known)


def nonfinite_data(rng: random.Random, draft: Draft) -> None:
    if len(draft.data) >= 4:
        at = rng.randrange(len(draft.data) // 4) * 4
        draft.data[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), float("-inf")]))


def other_data(rng: random.Random, draft: Draft) -> None:
    draft.data[:] = scrambled(rng, bytes(draft.data))


def all_in_another_dtype(rng: random.Random, draft: Draft) -> None:
    """The whole data in float64 or float16, consistently: a good file of another kind."""
    name, kind = rng.choice([("F64", "<f8"), ("F16", "<f2"), ("I64", "<i8"), ("I32", "<i4")])
    values = numpy.frombuffer(bytes(draft.data[: len(draft.data) // 4 * 4]), "<f4")
    with numpy.errstate(all="ignore"):
        draft.data[:] = values.astype(kind).tobytes()
    for key, entry in draft.pairs:
        if key != "__metadata__" and isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            entry["dtype"] = name
            scaled = [n * int(kind[2]) // 4 if type(n) is int else n for n in entry["data_offsets"]]
            entry["data_offsets"] = scaled


HEADER = [
    a_dtype, a_shape, an_offset, a_name, a_missing_tensor, a_second_key, two_swapped, an_entry, a_key_of_an_entry,
    metadata, metadata, metadata, nonfinite_data, other_data, all_in_another_dtype,
]  # fmt: skip


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
    """Every key of the settings by every hostile value, and every thing in every place."""
    found: list[tuple[Original, str, Any]] = []
    for original in originals:
        found += [(original, "setting", (key, value)) for key in keys_of_config(original) for value in VALUES]
        found += [(original, "place", place) for place in places(original)]
    return found


def made(case: tuple[Original, str, Any]) -> Mutant:
    original, what, detail = case
    files: dict[str, bytes | Callable[[Path], None]] = {CONFIG: original.config, TENSORS: original.tensors}
    kind = "sealed" if original.sealed else "unsealed"
    if what == "setting":
        files[CONFIG] = with_setting(original.config, *detail)
        return Mutant(f"{detail[0]} = {detail[1][:60]}", kind, original.effect, files)
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
