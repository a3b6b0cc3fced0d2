"""transformers' Trainer and its subclasses (TRL's, sentence-transformers') over a model that carries adapters.

A trainer takes a subclass of its own class. Its checkpoints hold the adapters that train beside what Trainer keeps of
the optimizer, the schedule, the data and the random numbers; the base is not written again at each of them.
"""

import inspect
import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import LoraError, LoraWarning
from ..layers import hosts
from ..updates import Update
from .accelerators import adapters_in_states, is_accelerator
from .carried import carries, check_nothing_else_trains, has_adapters, load_adapters, save_adapters, trained_adapters
from .references import Reference
from .weights import Merged

if TYPE_CHECKING:
    TrainerBase: Any
else:
    TrainerBase = object

AnyT = TypeVar("AnyT")
_OWN_REFERENCE = ("GRPOTrainer", "RLOOTrainer")  # they load one by themselves, where `args.beta` is not 0


def adapters_only(trainer: AnyT) -> AnyT:
    """Checkpoints that hold the adapters alone, and the resume from them; for a model without adapters nothing changes.

    Of a class of transformers' Trainer (TRL's and sentence-transformers' are some) this is a subclass, whose `__init__`
    takes `reference=` as well where the trainer has a reference model: the name of an adapter that is loaded beside the
    trained one, or None for the base. There is no second base then.

    Args:
        trainer: a class of such trainers, one that was made already, or accelerate's Accelerator (before `save_state`
            and `load_state`).

    Returns:
        The subclass, or the same object.

    Raises:
        LoraError: another object; a trainer under FSDP or DeepSpeed, which write the model by themselves.
    """
    if is_accelerator(trainer):
        adapters_in_states(trainer)
        return trainer
    kind: Any = trainer if isinstance(trainer, type) else type(trainer)
    if not any(c.__name__ == "Trainer" and c.__module__ == "transformers.trainer" for c in kind.__mro__):
        raise LoraError(
            f"trainer: got {trainer!r}; allowed are transformers' Trainer and its subclasses (the class, or an object "
            "of it), and accelerate's Accelerator; for Lightning see LightningAdapters"
        )
    made: Any = kind if issubclass(kind, AdapterTrainer) else _made(kind)
    if isinstance(trainer, type):
        return made  # type: ignore[no-any-return]
    trainer.__class__ = made
    made._adopt(trainer)
    return trainer


@cache
def _made(kind: type) -> type:
    """One subclass for each class; it keeps the name, which trainers print and put into model cards."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (AdapterTrainer, kind), names)


class AdapterTrainer(TrainerBase):  # type: ignore[misc]  # of whichever trainer, so Any
    """Comes before a class of trainers."""

    def __init__(self, *args: Any, reference: str | None = None, **keywords: Any) -> None:
        signature = inspect.signature(super().__init__)
        given = signature.bind_partial(*args, **keywords)
        model: Any = given.arguments.get("model")
        own = "ref_model" not in signature.parameters and any(c.__name__ in _OWN_REFERENCE for c in type(self).__mro__)
        if not carries(model):
            if reference is not None:
                raise LoraError(f"reference: got {reference!r}, and the model carries no adapter; lora.load it first")
            super().__init__(*given.args, **given.kwargs)
            return
        _check(given.arguments, model)
        if own:
            self._init_without_second_base(given, reference)
        else:
            if "ref_model" in signature.parameters and given.arguments.get("ref_model") is None:
                given.arguments["ref_model"] = _reference(model, reference)
            elif reference is not None:
                raise LoraError(
                    f"reference: got {reference!r}, and {type(self).__name__} has no reference model, or was given one "
                    "as ref_model; leave one of them out"
                )
            super().__init__(*given.args, **given.kwargs)
        self._adopt()

    def _init_without_second_base(self, given: inspect.BoundArguments, reference: str | None) -> None:
        """Such a trainer loads its reference where beta is not 0, so beta is 0 meanwhile."""
        settings = given.arguments.get("args")
        if settings is None:
            raise LoraError(f"args: got None; give {type(self).__name__}'s config, whose beta says if there is a KL")
        beta, settings.beta = settings.beta, 0.0
        try:
            super().__init__(*given.args, **given.kwargs)
        finally:
            settings.beta = beta
        self.beta = beta
        if beta:
            self.ref_model = _reference(given.arguments["model"], reference)

    def _adopt(self) -> None:
        """What is done once to a trainer that is made."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise LoraError(
                "trainer: FSDP and DeepSpeed write the whole model by themselves at each checkpoint; train with DDP or "
                "on one device"
            )
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if getattr(self.args, "disable_dropout", False):
            _stop_dropout(model)
        if (generation := getattr(self, "vllm_generation", None)) is not None and carries(model):
            generation.model = Merged(generation.model)

    def train(self, *args: Any, **keywords: Any) -> Any:
        if carries(self.model):
            check_nothing_else_trains(self.model)
        return super().train(*args, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not carries(self.model):
            return super()._save(output_dir, state_dict)  # type: ignore[no-any-return]
        if not self.args.should_save:
            return None
        folder = self.args.output_dir if output_dir is None else output_dir
        save_adapters(self.model, folder)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))  # as Trainer does; nothing here reads it
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> Any:
        own = self.model if model is None else model
        if carries(own) and has_adapters(own, resume_from_checkpoint):
            return load_adapters(own, resume_from_checkpoint)
        asked = (resume_from_checkpoint,) if model is None else (resume_from_checkpoint, model)
        return super()._load_from_checkpoint(*asked)  # one of before, with the whole model

    def _load_best_model(self) -> Any:
        best = self.state.best_model_checkpoint
        if carries(self.model) and has_adapters(self.model, best):
            return load_adapters(self.model, best)
        return super()._load_best_model()


def _check(given: Mapping[str, Any], model: nn.Module) -> None:
    """Before the trainer touches anything."""
    if given.get("peft_config") is not None:
        raise LoraError(
            f"peft_config: the model carries {', '.join(trained_adapters(model))} already, and PEFT would freeze it "
            "and train its own instead; leave peft_config out, or lora.remove(model) first"
        )
    if getattr(given.get("args"), "sync_ref_model", False):
        raise LoraError(
            "args: sync_ref_model moves the reference towards the model, and this reference is the base itself or an "
            "adapter; leave it out, or give a ref_model of your own"
        )


def _reference(model: nn.Module, name: str | None) -> Reference:
    made = Reference(model, name)
    if name is None and any(_acts(adapters.terms) for _, _, adapters in hosts(model)):
        warnings.warn(
            "reference: it is the base, and the model does not start there, as its adapter has been trained already. "
            "If it should be that adapter, lora.load(model, PATH, name='sft') it beside the trained one, activate that "
            "again, and give reference='sft'",
            LoraWarning,
            stacklevel=4,
        )
    return made


def _acts(parts: tuple[Any, ...]) -> bool:
    pairs = [pair for part in parts if isinstance(part, Update) for pair in part.pairs()]
    return any(bool(A.any()) and bool(B.any()) for A, B, _ in pairs)


def _stop_dropout(model: nn.Module) -> None:
    """What TRL's `disable_dropout` asks for reaches only modules of torch's Dropout."""
    dropping = [part for part in model.modules() if isinstance(part, Update) and part.dropout]
    for part in dropping:
        part.dropout = 0.0
    if dropping:
        warnings.warn(
            f"args: disable_dropout=True turns the dropout of {len(dropping)} adapted modules off, as it does for the "
            "base; give disable_dropout=False to keep both",
            LoraWarning,
            stacklevel=4,
        )
