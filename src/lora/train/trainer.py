"""transformers' Trainer, set up for a run."""

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

import lora

from ..data.collate import PaddingCollator
from ..data.encode import IGNORED, EncodedData
from ..data.template import PromptTemplate
from .defaults import LR
from .guard import Guard
from .needs import OPTIMIZERS
from .quiet import quiet
from .recipe import Recipe
from .watch import Watch

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class LoraTrainer(Trainer):
    """transformers' Trainer that tells a `Guard` of every forward and backward pass."""

    guard: Guard

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        tokens, trained = inputs["attention_mask"].sum(), inputs["labels"][:, 1:].ne(IGNORED).sum()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.add(loss, tokens, trained)
        return loss


def train(
    recipe: Recipe, model: Any, template: PromptTemplate, data: EncodedData, held_out: EncodedData | None,
    watch: Watch,
) -> None:  # fmt: skip
    guard = Guard([watch])
    use_cache = getattr(model.config, "use_cache", None)
    # Trainer makes its output folder even when it saves nothing there.
    with tempfile.TemporaryDirectory() as scratch, quiet():
        trainer = LoraTrainer(
            model=model, args=arguments(recipe, scratch, held_out is not None), callbacks=[guard, watch],
            train_dataset=data.rows, eval_dataset=held_out.rows if held_out else None,
            # The padding is masked, so its id does not matter; 0 is in every vocabulary.
            data_collator=PaddingCollator(template.tokenizer.pad_token_id or 0),
        )  # fmt: skip
        trainer.guard = guard
        trainer.remove_callback(PrinterCallback)
        # Trainer has moved the model to where it trains, so that the summary tells how it will run there.
        watch.console.print(str(lora.summary(model)), highlight=False, soft_wrap=True)
        try:
            trainer.train()
        finally:
            watch.stop()
            model.config.use_cache = use_cache  # Trainer turns the cache off for good
            model.eval()


def arguments(recipe: Recipe, scratch: str, evaluate: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=scratch, seed=recipe.seed, use_liger_kernel=recipe.liger,
        per_device_train_batch_size=recipe.batch_size, per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.grad_accum,
        num_train_epochs=recipe.epochs or 1, max_steps=recipe.max_steps or -1,
        optim=OPTIMIZERS[recipe.optimizer], learning_rate=recipe.lr or LR,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps or 0,
        weight_decay=recipe.weight_decay, max_grad_norm=recipe.max_grad_norm,
        train_sampling_strategy="group_by_length", remove_unused_columns=False,
        eval_strategy="epoch" if evaluate else "no", save_strategy="no", logging_strategy="no",
        logging_nan_inf_filter=False,  # it would show 0.0 for a NaN and go on
        report_to="none", disable_tqdm=True, log_level="error", dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    if arguments.n_gpu > 1:
        # With several GPUs in one process Trainer would wrap the model in DataParallel, which is slower than one GPU.
        arguments._n_gpu = 1
    return arguments
