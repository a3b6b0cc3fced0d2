"""Answers: prompted as in training, the same alone as in a batch, without the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora import LoraError
from lora.data.formats import Example, Message
from lora.train import generate
from lora.train.base import load_base, load_tokenizer
from lora.train.generation import row_prompts
from lora.train.record import kept_record, prompt_as_trained, style_as_trained
from lora.train.streaming import Pieces
from tiny_base import save_tiny_base

PROMPTS = ["Say hi.", "A rather longer prompt than the others, to make the padding work.", "x"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """Random weights of a size that makes the answers depend on the prompts."""
    loaded = load_base(str(base), torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return loaded


@pytest.fixture
def tok(base: Path) -> Any:
    return load_tokenizer(str(base))


def by_hand(model: Any, tokenizer: Any, prompt: str, steps: int) -> list[int]:
    """Greedy tokens, one full forward each: no cache, no padding."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = list(tokenizer(text)["input_ids"])
    new: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return new


def test_greedy_is_the_likeliest_token_after_the_training_template(model: Any, tok: Any) -> None:
    expected = [tok.decode(by_hand(model, tok, p, 12), skip_special_tokens=True) for p in PROMPTS]
    assert len(set(expected)) == len(expected), "the model must answer the prompts differently"
    for batch_size in (1, 2, 3):
        assert generate(model, tok, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


def test_the_models_own_sampling_settings_do_not_bend_greedy(model: Any, tok: Any) -> None:
    plain = generate(model, tok, PROMPTS, max_new_tokens=12)
    kept = model.generation_config
    model.generation_config = type(kept).from_dict({**kept.to_dict(), "repetition_penalty": 5.0, "num_beams": 2})
    try:
        assert generate(model, tok, PROMPTS, max_new_tokens=12) == plain
    finally:
        model.generation_config = kept


def test_an_answer_ends_at_the_stop_token(model: Any, tok: Any) -> None:
    new = by_hand(model, tok, "Say hi.", 8)
    tok.eos_token = tok.convert_ids_to_tokens(new[4])  # a token that comes up becomes the stop
    tok.chat_template = tok.chat_template.replace("<|endoftext|>", "")
    [answer] = generate(model, tok, ["Say hi."], max_new_tokens=8)
    assert answer == tok.decode(new[: new.index(new[4])])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_pieces_put_together_are_the_answer(model: Any, tok: Any, temperature: float) -> None:
    sampling = {"max_new_tokens": 24, "temperature": temperature, "seed": 5}
    for number, prompt in enumerate(PROMPTS):
        pieces: list[str] = []
        settings = {**sampling, "on_text": lambda index, piece, to=pieces: to.append(piece)}
        [whole], [grown] = generate(model, tok, [prompt], **sampling), generate(model, tok, [prompt], **settings)
        assert whole == grown == "".join(pieces), number
        assert len(pieces) > 4


def test_pieces_of_several_come_in_order_and_without_a_stop_token(model: Any, tok: Any) -> None:
    new = by_hand(model, tok, PROMPTS[0], 8)
    tok.eos_token = tok.convert_ids_to_tokens(new[4])  # no special token
    tok.chat_template = tok.chat_template.replace("<|endoftext|>", "")
    pieces: list[tuple[int, str]] = []
    answers = generate(model, tok, PROMPTS, max_new_tokens=8, on_text=lambda *piece: pieces.append(piece))
    assert [index for index, _ in pieces] == sorted(index for index, _ in pieces)
    assert answers == ["".join(piece for index, piece in pieces if index == i) for i in range(len(PROMPTS))]
    assert answers[0] == tok.decode(new[: new.index(new[4])])


@pytest.mark.parametrize("text", ["Ein Bär — 東京 🎉 naïve", "a  b .  c\n\n d"])
def test_no_piece_ends_within_a_character(tok: Any, text: str) -> None:
    pieces: list[str] = []
    streamer = Pieces(tok, {0}, pieces.append)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    ids = tok(text, add_special_tokens=False)["input_ids"]
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == tok.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_sampling_repeats_with_its_seed(model: Any, tok: Any) -> None:
    one, again, other = (
        generate(model, tok, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (3, 3, 4)
    )
    assert one == again != other


def test_examples_render_as_in_training(model: Any, tok: Any) -> None:
    [example] = row_prompts([{"prompt": "Say hi.", "completion": "unused"}])
    assert generate(model, tok, [example], max_new_tokens=6) == generate(model, tok, ["Say hi."], max_new_tokens=6)
    raw = Example(text="Say hi.")
    assert generate(model, tok, [raw], max_new_tokens=6) != generate(model, tok, ["Say hi."], max_new_tokens=6)


def test_progress_counts_every_prompt_and_the_mode_comes_back(model: Any, tok: Any) -> None:
    done: list[int] = []
    model.train()
    try:
        generate(model, tok, PROMPTS, max_new_tokens=1, batch_size=2, on_batch=done.append)
        assert model.training
    finally:
        model.eval()
    assert done == [2, 1]


def test_a_typed_prompt_takes_the_form_of_the_run(tmp_path: Path) -> None:
    plain = Example(messages=(Message(role="user", content="Add."),))
    assert prompt_as_trained("Add.", None) == plain
    assert prompt_as_trained("Add.", tmp_path) == plain  # an adapter of someone else's
    (tmp_path / "run.json").write_text(json.dumps({"format": "alpaca"}))
    assert "### Instruction:\nAdd." in prompt_as_trained("Add.", tmp_path).messages[0]["content"]
    assert style_as_trained(tmp_path) == "auto"
    (tmp_path / "run.json").write_text(json.dumps({"format": "alpaca", "template": "inst"}))
    assert style_as_trained(tmp_path) == "inst"
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "lora_merge.json").write_text(json.dumps({"base": "x", "trained": kept_record(tmp_path)}))
    assert (style_as_trained(merged), prompt_as_trained("Add.", merged)) == (
        "inst",
        prompt_as_trained("Add.", tmp_path),
    )
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(LoraError, match="not the record of a run"):
        prompt_as_trained("Add.", tmp_path)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["x"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["x"], {"batch_size": 0}, "batch_size is 0"),
        (["x"], {"temperature": -1.0}, "temperature is -1.0"),
        (["x"], {"temperature": float("nan")}, "temperature is nan"),
        (["x"], {"max_new_tokens": 500}, "prompt 1 has .* tokens, and max_new_tokens=500 more would pass the 128"),
        ([Example(text="")], {}, "prompt 1 is empty"),
        (["x", " \n"], {}, "prompt 2 is empty"),
        (
            ["x", "half \ud83d of it"],
            {},
            r"prompt 2 is no text: it holds '\\ud83d', half of a character, after 'half '",
        ),
    ],
)
def test_what_cannot_be_generated(model: Any, tok: Any, prompts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        generate(model, tok, prompts, **settings)


def test_rows_without_a_prompt_are_named() -> None:
    with pytest.raises(LoraError, match="input: row 2: the fields 'completion' fit no known format"):
        row_prompts([{"prompt": "x"}, {"completion": "y"}])
