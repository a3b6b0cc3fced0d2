"""A step's loss and gradient are those of its tokens, however they were split, padded or packed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

import lora
from conftest import tiny_gpt2, tiny_llama
from lora import LoraError
from lora.data.collate import PackingCollator, PaddingCollator
from lora.data.encode import IGNORED, Encoded
from lora.data.packs import packed
from lora.train.losses import held_out_loss, loss_of, token_weighted, trained_tokens
from said import said

Batch = dict[str, Any]


def rows(lengths: list[int], prompts: list[int]) -> list[Encoded]:
    made = []
    for seed, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids = torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        made.append(Encoded(input_ids=ids, labels=[IGNORED] * prompt + ids[prompt:]))
    return made


# Of all kinds: one and two tokens, nothing trained, trained whole, one token trained.
ROWS = rows([20, 3, 2, 17, 1, 9, 30, 12], [4, 1, 0, 16, 0, 9, 2, 5])
TRAINED = sum(label != IGNORED for row in ROWS for label in row["labels"][1:])


def qwen3(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = hf.Qwen3Config(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=64, pad_token_id=0, **changes,
    )  # fmt: skip
    return hf.Qwen3ForCausalLM(config)


MODELS = {"llama": tiny_llama, "qwen3": qwen3, "gpt2": tiny_gpt2}


def adapted(name: str, attention: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = MODELS[name](attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(1)
    lora.inject(model, r=4, targets="all-linear")
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)  # zero, it would hide A's gradients
    return model.to(dtype)


def gradients(model: nn.Module, batches: list[Batch]) -> tuple[float, Tensor]:
    """One step's loss and the gradient of all that trains, as Trainer comes by them."""
    count = sum(trained_tokens(batch["labels"]) for batch in batches)
    model.zero_grad()
    losses = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        loss = token_weighted(model(**inputs), batch["labels"], count)
        loss.backward()
        losses.append(loss.item())
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads
    return sum(losses), torch.cat(grads).float()


def padded_batches(size: int) -> list[Batch]:
    return [dict(PaddingCollator(0)(ROWS[start : start + size])) for start in range(0, len(ROWS), size)]


def packed_batches(size: int, capacity: int = 32) -> list[Batch]:
    packs = [[ROWS[row] for row in pack] for pack in packed([len(row["input_ids"]) for row in ROWS], capacity)]
    assert 2 < len(packs) < len(ROWS)
    return [PackingCollator(0)(packs[start : start + size]) for start in range(0, len(packs), size)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_steps_gradient_is_the_same_however_it_is_split_padded_or_packed(name: str, attention: str) -> None:
    model = adapted(name, attention)
    loss, gradient = gradients(model, padded_batches(8))
    assert loss > 1 and gradient.abs().max() > 1e-3
    ways = [padded_batches(4), padded_batches(2), padded_batches(1)]
    ways += [packed_batches(size) for size in (1, 2, 8)] + [packed_batches(8, capacity=30)]
    for batches in ways:
        other_loss, other = gradients(model, batches)
        assert other_loss == pytest.approx(loss, abs=1e-6 * loss)
        assert (other - gradient).abs().max() <= 1e-6 * max(1, float(gradient.abs().max()))


def test_the_loss_by_hand() -> None:
    logits = torch.randn(2, 4, 97, requires_grad=True)
    labels = torch.tensor([[5, 1, IGNORED, 2], [IGNORED, IGNORED, 3, IGNORED]])
    steps = logits.log_softmax(-1)
    expected = -(steps[0, 0, 1] + steps[0, 2, 2] + steps[1, 1, 3])
    assert trained_tokens(labels) == 3
    for outputs in (CausalLMOutput(logits=logits), {"logits": logits}, (logits,)):
        torch.testing.assert_close(token_weighted(outputs, labels), expected / 3)
        torch.testing.assert_close(token_weighted(outputs, labels, 12), expected / 12)
        torch.testing.assert_close(token_weighted(outputs, labels, torch.tensor(12)), expected / 12)


def test_a_step_without_a_trained_token_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 3, 97, requires_grad=True)
    loss = token_weighted((logits,), torch.full((1, 3), IGNORED), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_the_loss_of_16_bit_logits_is_summed_in_fp32() -> None:
    logits = torch.randn(1, 300, 97).bfloat16()
    labels = torch.randint(0, 97, (1, 300))
    loss = token_weighted((logits,), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, token_weighted((logits.float(),), labels))


def mixtral(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **changes,
    )  # fmt: skip
    return hf.MixtralForCausalLM(config)


def test_the_routers_loss_is_part_of_a_step_where_the_config_asks_for_it() -> None:
    """By transformers' own sum, which it makes where it is given the labels."""
    assert loss_of(mixtral()) is token_weighted
    model = mixtral(output_router_logits=True, router_aux_loss_coef=0.5)
    loss, batch = loss_of(model), PaddingCollator(0)(ROWS)
    labels = batch.pop("labels")
    outputs = model(**batch)
    torch.testing.assert_close(loss(outputs, labels), model(**batch, labels=labels).loss)
    whole = loss(outputs, labels, TRAINED)
    torch.testing.assert_close(whole, token_weighted(outputs, labels) + 0.5 * outputs.aux_loss)
    found, expected = torch.zeros(()), token_weighted(outputs, labels)
    for some in (ROWS[:3], ROWS[3:]):
        batch = PaddingCollator(0)(some)
        labels = batch.pop("labels")
        outputs = model(**batch)
        found = found + loss(outputs, labels, TRAINED)
        expected = expected + 0.5 * outputs.aux_loss * trained_tokens(labels) / TRAINED
    torch.testing.assert_close(found, expected)


def test_a_routers_loss_that_cannot_be_had_is_said() -> None:
    model = mixtral(output_router_logits=True)
    logits, labels = torch.randn(1, 4, 97), torch.ones(1, 4, dtype=torch.long)
    with said("output_router_logits is on, but MixtralForCausalLM has no aux_loss: the routers' loss is left out"):
        assert loss_of(model)({"logits": logits}, labels) == token_weighted({"logits": logits}, labels)
    other = SimpleNamespace(config=SimpleNamespace(output_router_logits=True))
    other.config.get_text_config = lambda: other.config
    with said("output_router_logits is on, but SimpleNamespace has no router_aux_loss_coef"):
        loss_of(other)({"logits": logits, "aux_loss": torch.ones(())}, labels)


class Meaning(hf.LlamaForCausalLM):  # type: ignore[misc]
    """A model as some are: it takes any keyword and means its loss over its own batch all the same."""

    def forward(self, labels: Tensor | None = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        return super().forward(labels=labels, **inputs)


class Gradients(TrainerCallback):
    """The gradient of the first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten() for p in kwargs["model"].parameters() if p.grad is not None]
        self.gradient = torch.cat(grads).clone()


def by_trainer(model: nn.Module, folder: Path, size: int, loss: Any = token_weighted) -> Tensor:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=0, learning_rate=0.0,
        remove_unused_columns=False, train_sampling_strategy="sequential", logging_strategy="no",
    )  # fmt: skip
    seen = Gradients()
    trainer = Trainer(
        model, arguments, train_dataset=ROWS, data_collator=PaddingCollator(0), compute_loss_func=loss, callbacks=[seen]
    )
    trainer.train()
    return seen.gradient


@pytest.mark.parametrize("kind", [hf.LlamaForCausalLM, Meaning])
def test_trainers_gradient_is_that_of_the_steps_tokens_for_any_model(kind: type, tmp_path: Path) -> None:
    model = tiny_llama()
    model.__class__ = kind
    whole = by_trainer(model, tmp_path, 8)
    for size in (4, 2, 1):
        assert (by_trainer(model, tmp_path, size) - whole).abs().max() <= 1e-6
    own = by_trainer(model, tmp_path, 2, loss=None)  # what Trainer does by itself
    assert ((own - whole).abs().max() <= 1e-6) == (kind is not Meaning)


@pytest.mark.parametrize("collator", ["padding", "packing"])
def test_the_held_out_loss_is_the_mean_over_tokens(collator: str) -> None:
    model = adapted("llama", "sdpa")
    model.train()
    batches = padded_batches(3) if collator == "padding" else packed_batches(2)
    seed = torch.get_rng_state()
    loss = held_out_loss(model, batches)
    assert loss == pytest.approx(gradients(model.eval(), padded_batches(8))[0], rel=1e-6)
    with torch.no_grad():
        means = [float(token_weighted(model(**batch), batch["labels"])) for batch in batches]
    assert abs(sum(means) / len(means) - loss) > 1e-3 * loss
    assert torch.equal(seed, torch.get_rng_state())


def test_the_held_out_loss_leaves_each_module_in_its_mode_also_after_an_error() -> None:
    model: Any = adapted("llama", "sdpa")
    model.train()
    model.lm_head.eval()
    with pytest.raises(KeyError, match="labels"):
        held_out_loss(model, [{"input_ids": torch.ones(1, 2, dtype=torch.long)}])
    assert model.training and model.model.training and not model.lm_head.training
    with pytest.raises(LoraError, match="batches: there is none"):
        held_out_loss(model, [])


def test_packs_of_half_precision_train_as_their_rows_do() -> None:
    model = adapted("llama", "sdpa", torch.bfloat16)
    loss, gradient = gradients(model, padded_batches(8))
    other_loss, other = gradients(model, packed_batches(8))
    assert other_loss == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.99
