"""save and load: whole or not at all, and PEFT's format both ways."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from conftest import randomize, same_bits, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from lora import LoraError
from lora.layers import hosts

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def look(model: nn.Module) -> tuple:
    return (
        [(n, type(m), m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        [(n, a.active, a.undo is None) for n, _, a in hosts(model)],
    )


def refused(model: nn.Module, folder: Path, match: str, **keywords: object) -> None:
    """load raises LoraError, and the model is the same to the bit."""
    values, state = snapshot(model), look(model)
    with pytest.raises(LoraError, match=match):
        lora.load(model, folder, **keywords)
    assert look(model) == state
    assert same_bits(snapshot(model), values)


def saved(folder: Path, **changes: object) -> nn.Module:
    model = tiny_llama()
    lora.inject(model, **{"r": 4, "targets": ["q_proj", "v_proj"], **changes})
    lora.save(randomize(model), folder)
    return model


def parts(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {
        f"{host}.{n}": p.detach() for host, _, a in hosts(model) if name in a for n, p in a[name].named_parameters()
    }


def quiet(verb: Callable, *args: object, **keywords: object) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return verb(*args, **keywords)


# Damage


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    raw = (tmp_path / TENSORS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    model = tiny_llama()
    for length in (0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(raw) - 4, len(raw) - 1):
        (tmp_path / TENSORS).write_bytes(raw[:length])
        refused(model, tmp_path, TENSORS)
    (tmp_path / TENSORS).write_bytes(raw + b"\0")
    refused(model, tmp_path, TENSORS)
    config = (tmp_path / CONFIG).read_bytes()
    (tmp_path / TENSORS).write_bytes(raw)
    for length in (0, 1, len(config) // 2, len(config) - 3):
        (tmp_path / CONFIG).write_bytes(config[:length])
        refused(model, tmp_path, CONFIG)


def test_every_flipped_bit_of_the_header_is_an_error(tmp_path: Path) -> None:
    """Of the header as of the tensors, and never another error than ours."""
    model = nn.Sequential(nn.Linear(4, 4))
    lora.inject(model, r=1, targets=["0"])
    lora.save(randomize(model), tmp_path)
    lora.remove(model)
    raw = (tmp_path / TENSORS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    accepted, other = [], []
    for place in range(start):
        for bit in range(8) if place % 25 == 0 else [place % 7]:
            damaged = bytearray(raw)
            damaged[place] ^= 1 << bit
            (tmp_path / TENSORS).write_bytes(damaged)
            where = bytes(damaged[max(0, place - 12) : place + 12])
            try:
                lora.load(model, tmp_path)
                lora.remove(model)
                accepted.append(where)
            except LoraError:
                assert not list(hosts(model))
            except Exception as error:
                other.append((type(error).__name__, where))
    assert not other, (len(other), other[:5])
    assert not accepted, (len(accepted), accepted[:5])


def test_every_flipped_bit_of_a_tensor_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, layers=[0], targets=["q_proj"], r=1)
    raw = (tmp_path / TENSORS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    model = tiny_llama()
    for place in range(start, len(raw), 7):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        (tmp_path / TENSORS).write_bytes(damaged)
        with pytest.raises(LoraError, match="checksum"):
            lora.load(model, tmp_path, check=False)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    saved(tmp_path, train=["norm"])
    whole = load_file(tmp_path / TENSORS)
    model = tiny_llama()
    keys = sorted(whole)
    assert len(keys) == 13
    for key in keys:
        without = {k: v for k, v in whole.items() if k != key}
        save_file(without, tmp_path / TENSORS)
        refused(model, tmp_path, "missing: " + key.replace(".", r"\."))
        save_file({**without, key: whole[key][..., :-1].contiguous()}, tmp_path / TENSORS)
        refused(model, tmp_path, "another shape: " + key.replace(".", r"\."))
        save_file({**without, key: whole[key].to(torch.int32)}, tmp_path / TENSORS)
        refused(model, tmp_path, "another kind")
    for extra in ("x", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", keys[0] + ".bias"):
        save_file({**whole, extra: torch.ones(3)}, tmp_path / TENSORS)
        refused(model, tmp_path, "unexpected: " + extra.replace(".", r"\."))
    save_file(whole, tmp_path / TENSORS)
    lora.load(model, tmp_path)


def test_a_failed_load_beside_another_adapter_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors.popitem()
    save_file(tensors, tmp_path / TENSORS)
    model = tiny_llama().train()
    lora.inject(model, targets=["k_proj"], name="mine", bias="all", train=["norm"])
    refused(model, tmp_path, "tensors missing")
    lora.merge(model)
    refused(model, tmp_path, "merged")


def test_the_config_of_another_save_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", alpha=8)
    for name, changes in {
        "alpha": {"alpha": 9},
        "rslora": {"alpha": 8, "rslora": True},
        "pattern": {"alpha": 8, "alpha_pattern": {"q_proj": 1}},
    }.items():
        saved(tmp_path / name, **changes)
        mine = (tmp_path / "a" / CONFIG).read_bytes()
        (tmp_path / "a" / CONFIG).write_bytes((tmp_path / name / CONFIG).read_bytes())
        refused(tiny_llama(), tmp_path / "a", "check=False")
        lora.load(tiny_llama(), tmp_path / "a", check=False)
        (tmp_path / "a" / CONFIG).write_bytes(mine)
    lora.load(tiny_llama(), tmp_path / "a")


@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_base_in_another_precision_is_the_same_base(
    saved_in: torch.dtype, loaded_in: torch.dtype, tmp_path: Path
) -> None:
    for seed in range(3):
        model, other = (tiny_llama() for _ in range(2))
        for each in (model, other):
            with torch.no_grad():
                for p in each.parameters():  # small, large and subnormal in fp16
                    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
                    p.copy_(noise * torch.tensor([1e-7, 1e-3, 1.0, 1e3])[torch.arange(p.numel()).view(p.shape) % 4])
        model.to(saved_in)
        lora.inject(model, targets="all-linear", r=1)
        lora.save(model, tmp_path)
        lora.load(other.to(loaded_in), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_base_of_the_same_shapes_is_refused_in_every_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path)
    other = tiny_llama()
    with torch.no_grad():  # fine-tuned: every weight moved by a tenth
        for p in other.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    refused(other.to(dtype), tmp_path, "another base")
    lora.load(other, tmp_path, check=False)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    saved(tmp_path)
    witness = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {witness}",)

    bomb = pickle.dumps(Bomb())
    (tmp_path / TENSORS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(bomb)
    refused(tiny_llama(), tmp_path, "pickle")
    (tmp_path / TENSORS).write_bytes(bomb)
    refused(tiny_llama(), tmp_path, TENSORS)
    torch.save({"x": torch.zeros(1)}, tmp_path / TENSORS)
    refused(tiny_llama(), tmp_path, TENSORS)
    assert not witness.exists()


def test_a_wrong_path_says_what_to_do(tmp_path: Path) -> None:
    model = tiny_llama()
    refused(model, tmp_path / "nowhere", "nowhere. does not exist; give the directory")
    saved(tmp_path / "out" / "adapter")
    refused(model, tmp_path / "out", "there is one in .*adapter")
    refused(model, tmp_path / "out" / "adapter" / CONFIG, "adapter_config.json")
    (tmp_path / "out" / "adapter" / TENSORS).unlink()
    refused(model, tmp_path / "out" / "adapter", "has no " + TENSORS)


# Atomicity

WRITER = """
import sys, torch, lora
from torch import nn
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
with torch.no_grad():
    for p in model.parameters(): p.fill_(0.5)
lora.inject(model, r=64, targets=["0", "1"])
value = 0.0
while True:
    value += 1
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad: p.fill_(value)
    lora.save(model, sys.argv[1])
    print(int(value), flush=True)
"""


def test_sigkill_while_saving_leaves_the_old_or_the_new_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for attempt in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()  # one save is done
        time.sleep(0.03 + 0.0237 * attempt)
        writer.send_signal(signal.SIGKILL)
        done = [1, *map(int, writer.stdout.read().split())]
        writer.wait()
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        lora.load(model, folder)
        values = {p.unique().item() for p in parts(model).values()}
        assert len(values) == 1  # of one save
        assert values <= {done[-1], done[-1] + 1}  # the last one told, or the one under way


@pytest.mark.parametrize("step", ["fsync 1", "fsync 2", "replace 1"])
def test_a_save_that_fails_keeps_the_old_adapter(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = tiny_llama()
    lora.inject(new, r=2, targets=["k_proj"])
    name, _, nth = step.partition(" ")
    calls = []
    real = getattr(os, name)

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == int(nth or 1):
            raise OSError("no space left")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(LoraError, match="could not be saved, and what is there is as it was .no space left"):
            lora.save(new, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    found = lora.load(tiny_llama(), tmp_path)
    assert same_bits(parts(found), parts(old))


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    saved(tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o666 & ~mask}


# Round trips


def test_several_adapters_nest_as_peft_lays_them_out(tmp_path: Path) -> None:
    model = saved(tmp_path / "unused")
    lora.inject(model, r=2, targets=["k_proj"], name="legal")
    randomize(model, seed=5)
    lora.save(model, tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and "unused" not in str(p)}
    assert files == {TENSORS, CONFIG, f"legal/{TENSORS}", f"legal/{CONFIG}"}
    lora.save(model, tmp_path / "one", name="legal")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {TENSORS, CONFIG}
    other = lora.load(tiny_llama(), tmp_path)
    lora.load(other, tmp_path / "legal", "legal")
    for name in ("default", "legal"):
        assert same_bits(parts(other, name), parts(model, name))


def test_save_of_a_merged_model_saves_the_adapter_and_stays_merged(tmp_path: Path) -> None:
    model = tiny_bert()
    lora.inject(model, targets=["query"], bias="all", train=["classifier"])
    randomize(model)
    lora.save(model, tmp_path / "a")
    lora.merge(model)
    values = snapshot(model)
    lora.save(model, tmp_path / "b")
    assert same_bits(snapshot(model), values)
    assert same_bits(load_file(tmp_path / "a" / TENSORS), load_file(tmp_path / "b" / TENSORS))
    with safe_open(tmp_path / "a" / TENSORS, "pt") as a, safe_open(tmp_path / "b" / TENSORS, "pt") as b:
        mine, theirs = a.metadata(), b.metadata()
        assert all(mine[k] == theirs[k] for k in mine.keys() | theirs.keys() if k != "lora.sha256")


def test_load_does_not_tie_the_model_to_the_file(tmp_path: Path) -> None:
    saved(tmp_path)
    model = lora.load(tiny_llama(), tmp_path)
    before = {k: v.clone() for k, v in parts(model).items()}
    (tmp_path / TENSORS).write_bytes(b"\xff" * (tmp_path / TENSORS).stat().st_size)
    assert same_bits(parts(model), before)


CONFIGS: dict[str, tuple[Callable[..., nn.Module], dict]] = {
    "plain": (tiny_llama, {"target_modules": ["q_proj", "v_proj"]}),
    "rank_pattern": (tiny_llama, {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^.*o_proj": 3}}),  # noqa: E501  (a row of a table)
    "alpha_pattern": (tiny_llama, {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 5, r"layers\.[02].*q_proj": 3}}),  # noqa: E501  (a row of a table)
    "both patterns, rslora": (tiny_llama, {"target_modules": ["q_proj", "k_proj"], "use_rslora": True, "alpha_pattern": {"k_proj": 5}, "rank_pattern": {"q_proj": 7}}),  # noqa: E501  (a row of a table)
    "modules_to_save": (tiny_bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "modules_to_save nested": (tiny_bert, {"target_modules": ["query"], "modules_to_save": ["pooler"]}),
    "seq_cls": (tiny_bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias all": (tiny_bert, {"target_modules": ["query", "value"], "bias": "all"}),
    "bias lora_only": (tiny_bert, {"target_modules": ["query", "output.dense"], "bias": "lora_only"}),
    "bias all on Conv1D": (tiny_gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "exclude": (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "exclude regex": (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"}),
    "layers": (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "one layer": (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers_pattern": (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),  # noqa: E501  (a row of a table)
    "regex": (tiny_llama, {"target_modules": r".*layers\.[01]\..*(q|down)_proj"}),
    "all-linear": (tiny_llama, {"target_modules": "all-linear"}),
    "default targets": (tiny_llama, {}),
    "lm_head": (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "full names": (tiny_llama, {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CONFIGS))
def test_peft_and_we_read_each_others_files(case: str, tmp_path: Path, ids: Tensor) -> None:
    build, keywords = CONFIGS[case]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **keywords})
    theirs = quiet(peft.get_peft_model, build(), config)
    randomize(theirs, seed=3)
    theirs.eval()
    quiet(theirs.save_pretrained, tmp_path / "theirs")
    logits = theirs(ids).logits

    ours = lora.load(build(), tmp_path / "theirs")
    close(ours(ids).logits, logits)
    mine = load_file(tmp_path / "theirs" / TENSORS)
    lora.save(ours, tmp_path / "ours")
    kept = load_file(tmp_path / "ours" / TENSORS)
    copies = {k for k in mine.keys() - kept.keys() if k.endswith((".base_layer.weight", "embed_tokens.weight"))}
    assert same_bits({k: v for k, v in mine.items() if k not in copies}, kept)
    assert bool(copies) == (case == "lm_head")

    before = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    after = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert before.keys() <= after.keys()
    maths = ("r", "lora_alpha", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "modules_to_save", "task_type")
    assert {k: after[k] for k in maths} == {k: before[k] for k in maths}

    again, report = quiet(load_with_peft, build(), tmp_path / "ours")
    assert not report
    close(again(ids).logits, logits)
    found = {k: v for k, v in quiet(peft.get_peft_model_state_dict, again).items() if k not in copies}
    assert same_bits({k: v.contiguous() for k, v in found.items()}, kept)
    if case != "lm_head":  # ours again: the second round is to the bit
        once_more = lora.load(build(), tmp_path / "ours")
        assert same_bits(parts(once_more), parts(ours))
        assert torch.equal(once_more(ids).logits, ours(ids).logits)


def load_with_peft(model: nn.Module, folder: Path) -> tuple[nn.Module, list[str]]:
    """(model, the adapter keys that PEFT did not find or did not expect)"""
    config = peft.PeftConfig.from_pretrained(folder)
    wrapped = peft.PeftModel(model, config)
    result = wrapped.load_adapter(folder, "default")
    missing = [k for k in result.missing_keys if "lora_" in k or "modules_to_save" in k]
    return wrapped.eval(), missing + list(result.unexpected_keys)


def close(found: Tensor, wanted: Tensor) -> None:
    """To 1e-6 relative, over the whole."""
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-6
    assert wanted.norm() > 0


OURS: dict[str, tuple[Callable[..., nn.Module], dict]] = {
    "list": (tiny_llama, {"targets": ["q_proj", "v_proj"]}),
    "all-linear": (tiny_llama, {"targets": "all-linear", "rank_pattern": {"down_proj": 2}}),
    "all-linear, layers": (tiny_llama, {"targets": "all-linear", "layers": [1]}),
    "regex, layers": (tiny_llama, {"targets": r".*self_attn\.[qk]_proj", "layers": [0, 2]}),
    "list, layers": (tiny_llama, {"targets": ["q_proj", "mlp.up_proj"], "layers": [0, 2]}),
    "list, layers, no prefix": (lambda: tiny_llama().model, {"targets": ["q_proj"], "layers": [1]}),
    "list, layers, no prefix, gpt2": (lambda: tiny_gpt2().transformer, {"targets": ["c_attn"], "layers": [1]}),
    "exclude": (tiny_llama, {"targets": "all-linear", "exclude": ["mlp.up_proj"]}),
    "exclude a list": (tiny_llama, {"targets": ["q_proj"], "exclude": ["layers.0.self_attn.q_proj"]}),
    "rslora": (tiny_llama, {"targets": ["k_proj"], "rslora": True, "alpha_pattern": {"layers.0.self_attn.k_proj": 3.5}}),  # noqa: E501  (a row of a table)
    "head": (tiny_llama, {"targets": ["q_proj", "lm_head"]}),
    "train": (tiny_llama, {"targets": ["q_proj"], "train": ["norm", "lm_head"]}),
    "train a layer": (tiny_llama, {"targets": ["q_proj"], "train": ["layers.1"]}),
    "train a target": (tiny_bert, {"targets": ["query", "classifier"], "train": ["classifier"]}),
    "bias all": (tiny_gpt2, {"targets": ["c_attn"], "bias": "all", "train": ["ln_f"]}),
    "bias lora_only": (tiny_bert, {"targets": ["query", "key"], "bias": "lora_only"}),
    "dropout": (tiny_bert, {"targets": ["query"], "dropout": 0.1, "init": "kaiming"}),
}  # fmt: skip


@pytest.mark.parametrize("case", list(OURS))
def test_peft_loads_what_we_save(case: str, tmp_path: Path, ids: Tensor) -> None:
    build, keywords = OURS[case]
    ours = lora.inject(build(), r=4, alpha=6, **keywords)
    randomize(ours, seed=3)
    lora.save(ours, tmp_path)
    theirs, report = quiet(load_with_peft, build(), tmp_path)
    assert not report
    close(theirs(ids)[0], ours(ids)[0])
    found = quiet(peft.get_peft_model_state_dict, theirs, save_embedding_layers=False)
    # With bias="all" PEFT saves every key with "bias" in it, its own wrapper's too.
    found = {k: v for k, v in found.items() if ".original_module." not in k and ".modules_to_save." not in k}
    assert same_bits({k: v.contiguous() for k, v in found.items()}, load_file(tmp_path / TENSORS))
    back = lora.load(build(), tmp_path)
    assert same_bits(parts(back), parts(ours))
    assert torch.equal(back(ids)[0], ours(ids)[0])


def test_unknown_keys_of_a_config_are_kept(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    mine = {"x_vendor": {"a": [1, None]}, "revision": "v2", "base_model_name_or_path": "org/base", "task_type": "X"}
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **mine}))
    model = lora.load(tiny_llama(), tmp_path / "a")
    lora.save(model, tmp_path / "b")
    after = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert {k: after[k] for k in mine} == mine
    assert after == {**config, **mine}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("use_qalora", True),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["experts.w"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"a": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
    ],
)
def test_a_key_that_changes_the_maths_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, key: value}))
    refused(tiny_llama(), tmp_path, key, check=False)


def test_a_config_that_says_dora_does_not_fit_plain_tensors(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    refused(tiny_llama(), tmp_path, "dora|magnitude", check=False)


def test_every_key_of_pefts_config_is_either_understood_or_refused() -> None:
    """A new version of PEFT with a new switch has to be looked at before it may pass."""
    known = {
        "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
        "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
        "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
        "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
    }  # fmt: skip
    assert set(peft.LoraConfig().to_dict()) <= known, set(peft.LoraConfig().to_dict()) - known


def test_a_missing_alpha_means_what_peft_means_by_it(tmp_path: Path, ids: Tensor) -> None:
    theirs = quiet(peft.get_peft_model, tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    quiet(randomize(theirs).eval().save_pretrained, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for key in ("lora_alpha", "r"):
        (tmp_path / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        try:
            model = lora.load(tiny_llama(), tmp_path)
        except LoraError:
            continue  # refused is as good
        close(model(ids).logits, quiet(peft.PeftModel.from_pretrained, tiny_llama(), tmp_path)(ids).logits)


def test_load_onto_meta_and_fill_later(tmp_path: Path, ids: Tensor) -> None:
    wanted = saved(tmp_path)
    with torch.device("meta"):
        model = tiny_llama()
    lora.load(model, tmp_path)
    assert not any(p.is_meta for p in parts(model).values())
    base = tiny_llama().state_dict()
    model.load_state_dict(base, strict=False, assign=True)
    assert same_bits(parts(model), parts(wanted))


def test_a_loaded_adapter_is_frozen_unless_asked(tmp_path: Path) -> None:
    saved(tmp_path, train=["norm"])
    assert not any(p.requires_grad for p in lora.load(tiny_llama(), tmp_path).parameters())
    model = lora.load(tiny_llama(), tmp_path, trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora." in n
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_that_differs_by_a_light_fine_tune_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    lora.save(lora.inject(tiny_llama().to(dtype), targets=["q_proj"]), tmp_path)
    other = tiny_llama().to(dtype)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.004)
    with pytest.raises(LoraError, match="sampled weights differ"):
        lora.load(other, tmp_path)
