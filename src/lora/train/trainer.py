"""transformers' Trainer, which takes a whole step's rows at a time, in micro-batches that fit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .defaults import LR
from .feed import Feed, Item, rows_of
from .generators import Generators
from .guard import Guard, gradient_norm
from .length import Length
from .losses import loss_of
from .memory_retry import MicroBatches
from .needs import OPTIMIZERS
from .recipe import Recipe
from .schedules import scheduler
from .steps import RunCallback, Step, Teller

Collate = Callable[[list[Item]], dict[str, Any]]


class LoraTrainer(Trainer):
    """Trainer, whose batch is all rows of one optimizer step.

    So a step that runs out of memory can be taken again in smaller parts, one whose loss is not finite can be taken
    with the next rows instead, and the place in the rows is the feed's own. Between two steps the random numbers are
    left alone: what a callback or an evaluation draws does not change the run.

    random: the generators as the last step left them. position: of the feed, after the last step. on_begin: called
    once the optimizer is made, before any callback.
    """

    model: Any
    optimizer: Any
    random: Generators

    def __init__(
        self, model: Any, recipe: Recipe, length: Length, feed: Feed, collate: Collate, *,
        micro: MicroBatches, guard: Guard, callbacks: Sequence[TrainerCallback], folder: Path,
    ) -> None:  # fmt: skip
        """folder: Trainer wants one that is there, and writes nothing into it."""
        self.recipe, self.length, self.feed, self.micro, self.guard = recipe, length, feed, micro, guard
        told = [each for each in callbacks if isinstance(each, RunCallback)]
        self.on_begin: Callable[[], None] = lambda: None
        self.position = 0
        first = Teller(
            told, lambda: self.on_begin(), lambda: self.last, lambda: self.feed.position / self.feed.per_pass
        )
        super().__init__(
            model=model, args=arguments(recipe, length, folder), callbacks=[first, *callbacks],
            train_dataset=feed, data_collator=collate,
            compute_loss_func=loss_of(model) if recipe.task == "generate" and not recipe.liger else None,
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.random = Generators.now()
        self.trained = [p for p in model.parameters() if p.requires_grad]  # a walk over a large base takes milliseconds
        # Whether a micro-batch's loss is its share of the step's; else it is its own mean. Liger's kernel fuses the
        # loss into the model, which then divides by what it is told.
        self.weighted = self.compute_loss_func is not None or (recipe.liger and self.model_accepts_loss_kwargs)

    def get_train_dataloader(self) -> Any:
        return self.feed

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = scheduler(
                optimizer or self.optimizer, self.recipe.schedule, self.length.warmup, self.length.steps
            )
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        start, number = self.random, self.state.global_step + 1
        while True:
            items = inputs
            loss, trained = self.micro.fit(items, number, lambda cut: self._gradients(model, cut, start))
            norm, clip = gradient_norm(self.trained, self.args.max_grad_norm)
            losses, gradient = torch.stack([loss.double(), norm.to(loss.device).double()]).tolist()  # one sync
            tokens = sum(len(row["input_ids"]) for item in items for row in rows_of(item))
            lr = float(self.optimizer.param_groups[0]["lr"])
            self.last = Step(number, losses, gradient, lr, tokens, trained)
            if self.guard.passes(self.last, self.feed.taken):
                break
            self._forget_gradients()
            inputs = self.feed.take()
        clip()
        self.random, self.position = Generators.now(), self.feed.position
        return loss

    def _gradients(self, model: Any, cut: list[list[Item]], start: Generators) -> tuple[Tensor, int]:
        """(the step's loss, trained tokens); its gradient lies in the parameters, and nothing of before."""
        start.restore()
        self._forget_gradients()
        batches = [self.data_collator(items) for items in cut]
        trained = sum(_trained(batch["labels"]) for batch in batches)
        total = torch.zeros((), device=self.args.device)
        count = torch.tensor(trained, device=self.args.device)
        self.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            share = 1.0 if self.weighted else _trained(batch["labels"]) / trained
            loss: Any = self.compute_loss(
                model, self._prepare_inputs(batch), num_items_in_batch=count if self.weighted else None
            )
            loss = loss * share
            self.accelerator.backward(loss)
            total += loss.detach().to(total.device)
        return total, trained

    def _forget_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    # The gradient is measured and clipped where the step is judged.
    def _clip_grad_norm(self, model: Any) -> float:
        return self.last.grad_norm

    def _get_grad_norm(self, model: Any, grad_norm: float | None = None) -> float:
        return self.last.grad_norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # it would read a batch, and nobody asks for it


def _trained(labels: Tensor) -> int:
    """What the loss is the mean of: labels (rows, length) but for each row's first; all of (rows,)."""
    if labels.dim() == 1:
        return labels.numel()
    return int((labels[:, 1:] != -100).sum())


def arguments(recipe: Recipe, length: Length, folder: Path) -> TrainingArguments:
    """What Trainer is told. What it would do beside the steps (saving, measuring, reporting) is done here instead."""
    found = TrainingArguments(
        output_dir=str(folder), seed=recipe.seed, use_liger_kernel=recipe.liger, max_steps=length.steps,
        per_device_train_batch_size=1, gradient_accumulation_steps=1,  # its batch is a step
        optim=OPTIMIZERS[recipe.optimizer], learning_rate=recipe.lr or LR, weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm, remove_unused_columns=False,
        eval_strategy="no", save_strategy="no", logging_strategy="no",
        logging_nan_inf_filter=False,  # it would show 0.0 for a NaN and go on
        report_to="none", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    if found.n_gpu > 1:
        # With several GPUs in one process Trainer would wrap the model in DataParallel, which is slower than one GPU.
        found._n_gpu = 1
    return found
