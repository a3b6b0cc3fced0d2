"""LLaMA-Adapters on disk: our form, PEFT's adaption prompts both ways, and the published layout."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from lora import LoraError, LoraWarning, llama_adapter
from lora.files.description import describe
from small_adapter import CONFIG, TENSORS
from tiny_decoders import X, adapted, llama, opened, parts


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6 * float(other.detach().abs().max()), rtol=0)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model = adapted(llama())
    lora.save(model, tmp_path)
    return model, tmp_path


def test_a_save_comes_back_to_the_bit(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    other = lora.load(llama(), folder, trainable=True)
    assert torch.equal(other(X).logits, model(X).logits)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    config = json.loads((folder / CONFIG).read_text())
    assert {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_layers": 2,
        "adapter_len": 5,
        "target_modules": "self_attn",
    }.items() <= config.items()
    lora.save(other, folder / "again")
    assert (folder / "again" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_what_the_folder_holds_is_told(saved: tuple[Any, Path]) -> None:
    text = str(describe(saved[1]))
    assert "LLaMA-Adapter, 5 prompts in the top 2 layers, a gate for each head" in text
    assert "1 x 5 x 32" in text and "checksum: verified" in text and "total 328 parameters" in text


def test_another_base_and_other_shapes_are_refused(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1
    before = other(X).logits
    with pytest.raises(LoraError, match="trained on another base"):
        lora.load(other, folder)
    for changes, words in (
        ({"num_hidden_layers": 4}, "tensors do not fit"),
        ({"num_hidden_layers": 1}, "layers: got 2; LlamaForCausalLM has 1"),
        ({"hidden_size": 64}, "is \\(1, 5, 32\\), expected \\(1, 5, 64\\)"),
        ({"num_attention_heads": 2}, "is \\(1, 4, 1, 1\\), expected \\(1, 2, 1, 1\\)"),
    ):
        with pytest.raises(LoraError, match=words):
            lora.load(llama(**changes), folder)
    assert torch.equal(other(X).logits, before)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapter_len", None, "adapter_len is None; a whole number"),
        ("adapter_layers", 10**12, "adapter_layers is 1000000000000"),
        ("adapter_len", True, "adapter_len is True"),
        ("lora_gate", "soft", "gate: got 'soft'"),
        ("adapter_layers", 1, "not the one saved with the tensors|do not fit"),
        ("peft_type", "IA3", "this library reads 'LORA' and 'ADAPTION_PROMPT'"),
        ("peft_type", ["LORA"], "this library reads"),
    ],
)
def test_edited_settings_are_refused(saved: tuple[Any, Path], key: str, value: Any, words: str) -> None:
    file = saved[1] / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    model = llama()
    with pytest.raises(LoraError, match=words):
        lora.load(model, saved[1])
    assert not any(".lora." in name for name in model.state_dict())


def test_unknown_keys_of_a_loaded_file_are_kept(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_mapping": {"x": 1}}))
    lora.save(lora.load(llama(), folder), folder / "again")
    assert json.loads((folder / "again" / CONFIG).read_text())["auto_mapping"] == {"x": 1}


def test_several_adapters_and_a_low_rank_one_go_to_their_folders(tmp_path: Path) -> None:
    model = adapted(llama(), name="a")
    lora.inject(model, name="b", r=2, targets=["q_proj", "v_proj"])
    lora.activate(model, ["a", "b"])
    wanted = model(X).logits
    lora.save(model, tmp_path)
    other = lora.load(lora.load(llama(), tmp_path / "a", "a"), tmp_path / "b", "b")
    lora.activate(other, ["a", "b"])
    assert torch.equal(other(X).logits, wanted)


# PEFT's adaption prompts.


def of_peft(**changes: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            llama(**changes), peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("adaption_gate", "adaption_prompt")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}], ids=["grouped", "multi-head"])
def test_an_adaption_prompt_of_peft_gives_its_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = of_peft(**changes)
    theirs.save_pretrained(tmp_path)
    ours = lora.load(llama(**changes), tmp_path)
    assert close(ours(X).logits, theirs(X).logits)
    assert "one gate a layer" in str(lora.summary(ours)) and "one gate for each layer" in str(describe(tmp_path))


def test_an_adapter_with_a_gate_a_layer_is_one_of_peft(tmp_path: Path) -> None:
    import peft

    ours = adapted(llama(), gate="layer")
    lora.save(ours, tmp_path)
    assert "lora_gate" not in json.loads((tmp_path / CONFIG).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert close(theirs(X).logits, ours(X).logits)


def test_peft_does_not_take_a_gate_a_head_for_its_own(saved: tuple[Any, Path]) -> None:
    import peft

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="size mismatch"):
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(llama(), saved[1])


def test_the_gradients_of_peft_are_ours(tmp_path: Path) -> None:
    theirs = of_peft()
    theirs.save_pretrained(tmp_path)
    ours = lora.load(llama(), tmp_path, trainable=True)
    for model in (ours, theirs):
        model(X, labels=X).loss.backward()
    wanted = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for i, part in zip((1, 2), parts(ours), strict=True):
        for name, parameter in (("adaption_prompt", part.prompts), ("adaption_gate", part.gate)):
            assert close(parameter.grad, wanted[f"model.layers.{i}.self_attn.{name}"])


def test_where_peft_adds_a_bias_twice_the_load_says_so(tmp_path: Path) -> None:
    theirs = of_peft(attention_bias=True)
    theirs.save_pretrained(tmp_path)
    ours = llama(attention_bias=True)
    with torch.no_grad():
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                if name.endswith("o_proj.bias"):
                    parameter.fill_(0.5)
    with pytest.warns(LoraWarning, match="PEFT adds a second time"):
        lora.load(ours, tmp_path)
    assert (ours(X).logits - theirs(X).logits).abs().max() > 0.01


# The published layout.


def published_file(model: Any) -> dict[str, torch.Tensor]:
    held = parts(model)
    first = model.config.num_hidden_layers - len(held)
    tensors = {f"layers.{first + i}.attention.gate": part.gate.detach().clone() for i, part in enumerate(held)}
    return {**tensors, "adapter_query.weight": torch.cat([part.prompts.detach()[0] for part in held])}


def test_the_published_layout_is_read_from_both_files(tmp_path: Path) -> None:
    model = adapted(llama())
    tensors = published_file(model)
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    torch.save(
        {
            "model": {k: t.half() for k, t in tensors.items()},
        },
        tmp_path / "b.pth",
    )
    for name, exact in (("a.safetensors", True), ("a.pth", True), ("b.pth", False)):
        other = llama_adapter.load_published(llama(), tmp_path / name)
        assert torch.allclose(other(X).logits, model(X).logits, atol=0 if exact else 0.1, rtol=0)
    lora.save(other, tmp_path / "ours")
    assert torch.equal(lora.load(llama(), tmp_path / "ours")(X).logits, other(X).logits)


def test_a_published_file_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    tensors = published_file(adapted(llama()))
    gate = "layers.2.attention.gate"
    bad = {
        "has no adapter_query": {gate: tensors[gate]},
        "has no layers.N.attention.gate": {"adapter_query.weight": tensors["adapter_query.weight"]},
        "visual_proj.weight  fit nothing": {**tensors, "visual_proj.weight": torch.ones(1)},
        "gates are not those of the topmost": {k: t for k, t in tensors.items() if k != gate},
        "is \\(1, 8, 1, 1\\); this model needs \\(1, 4, 1, 1\\)": {**tensors, gate: torch.ones(1, 8, 1, 1)},
        "NaN": {**tensors, gate: torch.full((1, 4, 1, 1), float("nan"))},
    }
    model = llama()
    for words, content in bad.items():
        save_file(content, tmp_path / "a.safetensors")
        with pytest.raises(LoraError, match=words):
            llama_adapter.load_published(model, tmp_path / "a.safetensors")
    torch.save({"a": opened}, tmp_path / "a.pth")
    for name in ("a.pth", "none.pth"):
        with pytest.raises(LoraError):
            llama_adapter.load_published(model, tmp_path / name)
    assert not any(".lora." in name for name in model.state_dict()) and all(p.requires_grad for p in model.parameters())


def test_a_tensor_that_was_changed_on_disk_is_damage(saved: tuple[Any, Path]) -> None:
    file = saved[1] / TENSORS
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(LoraError, match="checksum"):
        lora.load(llama(), saved[1])
    assert load_file(file)
