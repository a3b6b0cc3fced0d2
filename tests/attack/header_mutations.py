"""An adapter's files taken apart, and what may be changed: bytes, and the structure of the header."""

import hashlib
import json
import random
import struct
from dataclasses import dataclass
from typing import Any

import numpy

from attacked_adapters import BLANK, CHECKSUM, Original
from hostile_values import DTYPES, MARK, STRINGS, VALUES, as_text, hostile


@dataclass
class Draft:
    """An adapter taken apart; `pairs` are the header's keys and values, as objects or, behind a mark, as JSON text."""

    original: Original
    pairs: list[list[Any]]
    data: bytearray

    @classmethod
    def of(cls, original: Original) -> "Draft":
        header, data = original.parts()
        return cls(original, [list(pair) for pair in header.items()], bytearray(data))

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
    entry = draft.tensor(rng)
    place = entry.get("data_offsets") if entry else None
    if entry and isinstance(place, list) and [*map(type, place)] == [int, int]:
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
    except (TypeError, ValueError, RecursionError):
        return rng.choice(VALUES)
    if isinstance(known, dict) and known:
        samples = known.get("samples")
        row = rng.choice(samples) if isinstance(samples, list) and samples and rng.random() < 0.5 else None
        if isinstance(row, list) and row:
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
