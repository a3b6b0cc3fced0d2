"""A file of a stranger is checked before memory is taken for it: our error, soon, in few words; or it loads."""

import json
import re
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora
from conftest import randomize, refused, tiny_llama
from lora import LoraError, LoraWarning
from lora.files.bounded import clip, clip_lines, parse
from lora.files.description import describe
from lora.files.patterns import STEPS, affordable, steps
from lora.layers import hosts

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SOON = 2  # seconds, for what would otherwise take for ever


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lora.save(randomize(lora.inject(net(), r=2, targets=["0", "1"])), tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another header, as text or as what `change` makes of it, and no seal of ours."""
    raw = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"format": "pt"}
    text = change(header) or json.dumps(header)
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :])


def with_metadata(value: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda header: header.update(__metadata__=value))


def with_settings(**changes: Any) -> Callable[[Path], None]:
    """PEFT's own form, with other settings; a string that starts with = is put there as it is."""

    def write(folder: Path) -> None:
        rewrite(folder, lambda header: None)
        text = json.dumps({**json.loads((folder / CONFIG).read_text()), **changes})
        (folder / CONFIG).write_text(re.sub(r'"=([^"]*)"', r"\1", text))

    return write


def sparse(folder: Path) -> None:
    """A header that claims 10 GiB, and a file that has them, of holes."""
    entry = {"dtype": "F32", "shape": [1 << 15, 80 << 10], "data_offsets": [0, 10 << 30]}
    text = json.dumps({"base_model.model.0.lora_A.weight": entry}).encode()
    with (folder / TENSORS).open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + (10 << 30))


def a_fingerprint(value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        lora.save(lora.inject(net(), r=2, targets=["0", "1"]), folder)
        with_metadata({"format": "pt", "lora.base": text})(folder)
        # No seal: what is tried here is what comes after it.

    return write


SAMPLE = {"layout": "x", "dtype": "float32", "quantisation": None, "samples": []}
HOSTILE: dict[str, Callable[[Path], Any]] = {
    "config nested 1000": lambda f: (f / CONFIG).write_text("[" * 1000 + "]" * 1000),
    "config nested 40": with_settings(runtime_config="=" + "[" * 40 + "]" * 40),
    "config null": lambda f: (f / CONFIG).write_text("null"),
    "a key twice": lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "r": 2}'),
    "an integer of 5,000 digits": with_settings(r="=" + "9" * 5000),
    "lora_alpha 10**400": with_settings(lora_alpha="=1" + "0" * 400),
    "lora_alpha 1e400": with_settings(lora_alpha="=1e400"),
    "lora_alpha NaN": with_settings(lora_alpha="=NaN"),
    "lora_alpha a text": with_settings(lora_alpha="8" * 10_000),
    "r 10**30": with_settings(r=10**30),
    "r 10**9": with_settings(r=10**9),
    "r true": with_settings(r=True),
    "rank_pattern 10**9": with_settings(rank_pattern={"0": 10**9}),
    "rank_pattern a list": with_settings(rank_pattern=[["0", 2]]),
    "targets a number": with_settings(target_modules=3),
    "targets of lists": with_settings(target_modules=[["0"]]),
    "targets of a million names": with_settings(target_modules=["x"] * 200_000),
    "half a surrogate pair": with_settings(base_model_name_or_path="\ud800"),
    "base a list": with_settings(base_model_name_or_path=["a"]),
    "layers a text": with_settings(layers_to_transform="0"),
    "modules_to_save an object": with_settings(modules_to_save={"a": 1}),
    "update a list": with_settings(lora_update=["mine"]),
    "update of 1 MB": with_settings(lora_update="x" * (1 << 20)),
    "base of 1 MB": with_settings(base_model_name_or_path="x" * (1 << 20)),
    "a pattern nested 5,000": with_settings(alpha_pattern={"(" * 5000 + ")" * 5000: 2}),
    "a pattern of 1 MB": with_settings(target_modules="a" * (1 << 20)),
    "many patterns": with_settings(alpha_pattern={f"a{i}" * 10: 2 for i in range(9_000)}),
    "a pattern with a flag inside": with_settings(alpha_pattern={"(?i)0": 2}),
    "config of 20 MB": lambda f: (f / CONFIG).write_text(" " * (20 << 20)),
    "config of lists": with_settings(x="=" + "[" + "[]," * 1_000_000 + "[]]"),
    "header nested 1000": lambda f: rewrite(f, lambda header: '{"a": ' + "[" * 1000 + "]" * 1000 + "}"),
    "header null": lambda f: rewrite(f, lambda header: "null"),
    "__metadata__ null": with_metadata(None),
    "an offset of 5,000 digits": lambda f: rewrite(f, lambda h: json.dumps(h).replace("[0, ", f"[{'9' * 5000}, ")),
    "a shape of 20,000 ones": lambda f: rewrite(f, lambda h: h[max(h)].update(shape=[1] * 20_000)),
    "a shape of huge numbers and a 0": lambda f: rewrite(f, lambda h: h[max(h)].update(shape=[0, 10**38])),
    "an unknown dtype of huge shape": lambda f: rewrite(f, lambda h: h[max(h)].update(dtype="F4", shape=[10**14] * 15)),
    "a key of 1 MB": lambda f: rewrite(f, lambda h: h.update({"x" * (1 << 20): h.pop(max(h))})),
    "a key that clears the screen": lambda f: rewrite(f, lambda h: h.update({"\x1b[2J\x07": h.pop(max(h))})),
    "a tensor of no dimension": lambda f: rewrite(
        f, lambda h: h.update({"base_model.model.2.lora_A.weight": {**h[max(h)], "shape": []}})
    ),
    "sparse, 10 GiB": sparse,
    "base: a list": a_fingerprint([]),
    "base: no JSON": a_fingerprint("{"),
    "base: nested": a_fingerprint("[" * 5000),
    "base: samples of texts": a_fingerprint({**SAMPLE, "samples": ["abcd"]}),
    "base: a sample far outside": a_fingerprint({**SAMPLE, "samples": [["0", 10**18, 0, 1.0]]}),
    "base: a negative sample": a_fingerprint({**SAMPLE, "samples": [["0", -1, 0, 1.0]]}),
    "base: a dtype that is none": a_fingerprint({**SAMPLE, "dtype": "nn"}),
    "base: a dtype of integers": a_fingerprint({**SAMPLE, "dtype": "int64"}),
    "base: quantisation a number": a_fingerprint({**SAMPLE, "quantisation": 4}),
    "base: a value of 10**400": a_fingerprint(json.dumps({**SAMPLE, "samples": [["0", 0, 0, 10**400]]})),
}  # fmt: skip


def outcome(verb: Callable[[], Any]) -> str | None:
    """What a verb refuses with; it may do nothing else but come to an end."""
    started = time.process_time()
    try:
        text = str(verb())
        told = None
    except LoraError as error:
        text = told = str(error)
    assert time.process_time() - started < SOON
    assert told is None or len(told) < 2500
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    text.encode()
    return told


@pytest.mark.parametrize("case", list(HOSTILE))
def test_foreign_exceptions_of_hostile_files_are_ours(case: str, folder: Path) -> None:
    HOSTILE[case](folder)
    model = net()
    state = torch.get_rng_state()
    assert outcome(lambda: lora.load(model, folder)) is not None
    assert not list(hosts(model)) and torch.equal(torch.get_rng_state(), state)
    outcome(lambda: lora.load(net(), folder, check=False))
    outcome(lambda: describe(folder))


def test_foreign_exceptions_of_a_rank_of_10_9_take_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(r=10**9)(folder)
    model, real, most = net(), torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: most.append(a) or real(*a, **k))
    refused(lambda: lora.load(model, folder), model, r"of another shape: .*lora_A.weight is \(2, 4\), expected \(1000")
    assert not most


def test_foreign_exceptions_of_a_sparse_file_of_10_gib_are_found_without_reading_it(folder: Path) -> None:
    sparse(folder)
    model = net()
    started = bytes_read()
    with pytest.raises(LoraError, match="shape"):
        lora.load(model, folder)
    assert describe(folder).file.verified is None  # nothing to compare its bytes with
    assert bytes_read() - started < 1 << 20


def bytes_read() -> int:
    """Of this process, from files."""
    counted = Path("/proc/self/io")
    if not counted.exists():
        pytest.skip("no /proc")
    return int(counted.read_text().split()[1])


def test_deep_recursion_of_the_caller_does_not_matter(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 5000)

    def down(levels: int) -> None:
        if levels:
            return down(levels - 1)
        with pytest.raises(LoraError, match="nested"):
            lora.load(net(), folder)

    down(sys.getrecursionlimit() // 2)


# Patterns

SLOW = ["(([a-z_.0-9]+)+)+!", "(.*)*!", "(a|ab|b)*!", r"(.*?\d?){1,15}!", ".*" * 30 + "!", r"(?:(?:\w+)*)*$!"]


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_hostile_config_whose_targets_take_for_ever_loads_by_its_tensors(
    key: str, pattern: str, tmp_path: Path
) -> None:
    model = randomize(lora.inject(tiny_llama(), r=2, targets=["q_proj", "v_proj"]))
    lora.save(model, tmp_path)
    with_settings(**{key: pattern})(tmp_path)
    started = time.process_time()
    with pytest.warns(LoraWarning, match="could take for ever to match; the tensors alone say"):
        again = lora.load(tiny_llama(), tmp_path)
    assert [name for name, *_ in hosts(again)] == [name for name, *_ in hosts(model)]
    assert "q_proj" in str(describe(tmp_path))
    lora.save(again, tmp_path / "again")  # what was loaded has no such pattern any more
    assert time.process_time() - started < 3 * SOON
    assert len(list(hosts(lora.load(tiny_llama(), tmp_path / "again")))) == 6


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_hostile_config_whose_ranks_or_alphas_take_for_ever_is_refused_by_name(
    key: str, pattern: str, folder: Path
) -> None:
    names = ["a" * 40 + ".0", "a" * 40 + ".1"]
    model = nn.ModuleDict({"a" * 40: net()})
    lora.save(lora.inject(model, r=2, targets=names), folder)
    with_settings(**{key: {pattern: 2}})(folder)
    for verb in (lambda: lora.load(nn.ModuleDict({"a" * 40: net()}), folder), lambda: describe(folder)):
        told = outcome(verb)
        assert told is not None and key in told and "could take for ever" in told


ORDINARY = [
    "q_proj", r".*\.(q|k|v)_proj", r".*layers\.[01]\..*(q|down)_proj", r"^(?!.*vision).*(?:q_proj|v_proj).*$",
    r"model\.layers\.(?:[0-9]|[12][0-9]|3[01])\.self_attn\.(q_proj|k_proj)", r"^(language_model(?=\.).*\.(q_proj|v))$",
    r".*\.layers\.\d+\.mlp\.(up|down|gate)_proj", r"(.*)\.self_attn\.(.*)_proj", r".*blocks\.\d{1,3}\..*\.qkv",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ORDINARY)
def test_an_ordinary_pattern_may_be_matched_with_a_large_model(pattern: str) -> None:
    names = [f"model.language_model.layers.{i}.self_attn.{n}_proj" for i in range(126) for n in "qkvogud"]
    assert affordable([pattern], names)


def test_a_pattern_for_each_module_of_a_large_model_is_affordable() -> None:
    names = [f"model.language_model.layers.{i}.self_attn.{n}_proj" for i in range(126) for n in "qkvogud"]
    assert affordable(names, names, ends=True)


@pytest.mark.parametrize(
    "pattern", [r".*.*.*!", r".*a.*a.*a!", r"(a|a|a)(a|a|a)(a|a|a)(a|a|a)!", r"(a?){4}!", r"a*a*b?!"]
)
def test_the_bound_on_the_steps_of_a_pattern_holds(pattern: str) -> None:
    """The time that is left to a pattern grows no faster than the bound says."""
    text = "a" * 40
    started = time.process_time()
    for _ in range(10):
        re.fullmatch(pattern, text)
    took = (time.process_time() - started) / 10
    assert 1 < steps(pattern, len(text)) < STEPS
    assert took < 1e-6 * steps(pattern, len(text)) + 1e-4


def test_a_pattern_that_contradicts_the_tensors_is_told(tmp_path: Path) -> None:
    lora.save(randomize(lora.inject(tiny_llama(), r=2, targets=["q_proj", "v_proj"])), tmp_path)
    for targets, words in ((".*[qk]_proj", "missing: .*k_proj"), ([r"q_proj"], "unexpected: .*v_proj")):
        with_settings(target_modules=targets)(tmp_path)
        with pytest.raises(LoraError, match=words):
            lora.load(tiny_llama(), tmp_path)


class Nested(nn.Module):
    """A list of modules inside a layer of another list, as mixtures of experts and vision towers have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def layer() -> nn.ModuleDict:
            experts = [nn.ModuleDict({"up": nn.Linear(5, 5)}) for _ in range(2)]
            return nn.ModuleDict({"w": nn.Linear(5, 5), "experts": nn.ModuleList(experts)})

        inner = [layer(), layer()]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(inner)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model["layers"]:
            x = layer["experts"][1]["up"](layer["experts"][0]["up"](layer["w"](x)))
        return x


@pytest.mark.parametrize("layers_pattern", [None, "layers", "experts"])
def test_layers_of_a_nested_list_are_those_of_pefts_tensors(layers_pattern: str | None, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["w", "up"], layers_to_transform=[1], layers_pattern=layers_pattern
    )  # fmt: skip
    try:
        theirs = peft.get_peft_model(Nested(), config)
    except ValueError:
        pytest.skip("PEFT finds no module")
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 5)
    assert torch.allclose(lora.load(Nested(), tmp_path)(x), theirs(x), atol=1e-6)


# What reads JSON, and what is shown of it


@pytest.mark.parametrize(
    "raw", [b'{"a": [1, 2.5, "x", null, true]}', b"[]", b'"\xc3\xa4"', b'"\\ud83d\\ude00"', b"-0.0"]
)
def test_json_is_read_as_python_reads_it(raw: bytes) -> None:
    assert repr(parse(raw)) == repr(json.loads(raw))


def test_json_out_of_bounds_is_refused() -> None:
    fine: Any = 1
    for _ in range(30):
        fine = [fine]
    assert parse(json.dumps(fine).encode()) == fine
    for raw in (
        json.dumps([[[fine]]]).encode(),
        b"[" * 10**5,
        b"NaN",
        b"1e999",
        b"-Infinity",
        b'{"a": 1, "a": 2}',
        b"1" * 41,
        b'"\\udc00"',
        b"\xff",
    ):
        with pytest.raises(ValueError, match=r"."):
            parse(raw)
    assert parse(b"1" * 40) == int("1" * 40)
    assert parse(b"[NaN, 1e999]", finite=False)[1] == float("inf")
    with pytest.raises(ValueError, match="more than 10 values"):
        parse(b"[1,1,1,1,1,1,1,1,1,1,1]", values=10)


def test_a_value_is_shown_in_few_signs_that_print() -> None:
    assert clip("x" * 80) == "x" * 80
    assert clip("x" * 81) == "x" * 80 + "..."
    assert clip("a\x1b[2J\nb\u0085é") == "a?[2J?b?é"
    assert clip_lines("a\n" * 9) == "a\na\na\na\na\n..."
