"""A reference model that is the trained one itself: its base, or another adapter on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import activate, disabled
from ..bases import is_quantized
from ..errors import LoraError, near
from ..layers.copies import base_parameters
from ..resident import resident
from .carried import carries, trained_adapters


def reference(model: nn.Module, adapter: str | None = None) -> "Reference":
    """What to give a trainer as `ref_model`, where it would load the base a second time.

    Args:
        model: what is trained; it carries adapters.
        adapter: one that is loaded beside the trained one and does not train; None: the base alone.

    Returns:
        A module without parameters of its own. A call runs the model with that adapter or with none, without dropout
        and without gradients, and leaves it as it was.

    Raises:
        LoraError: the model carries no adapter, or none of that name, or one that trains.
    """
    return Reference(model, adapter)


class Reference(nn.Module):
    """See `reference`. What it is asked for beside a call (`config`, `device`, ...) is the model's."""

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        super().__init__()
        if not carries(model):
            raise LoraError("model: it carries no adapter, so it is its own reference; lora.inject one first")
        if adapter is not None:
            there = resident(model)
            if adapter not in there:
                raise LoraError(f"reference: the model has no adapter {adapter!r}{near(adapter, there)}; lora.load it")
            if adapter in trained_adapters(model):
                raise LoraError(
                    f"reference: adapter {adapter!r} trains, so it would not stay where it is; load it a second time "
                    "under another name, lora.load(model, PATH, name='reference'), activate the trained one again, and "
                    "give that name"
                )
        # Not a child: nothing that is done to this module (moved, cast, counted, wrapped) is done to the model again.
        self.__dict__["_model"], self.adapter = model, adapter

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__ and "_model" in self.__dict__:
            return getattr(self.__dict__["_model"], name)
        raise AttributeError(name)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        # Not `forward`, for which trainers put others; the model's own has got the same.
        model = self.__dict__["_model"]
        with torch.no_grad(), self._stands():
            return model(*args, **keywords)

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What the reference's answers depend on, for those who keep them and want to know them again."""
        model = self.__dict__["_model"]
        state = {name: parameter.detach() for name, parameter in base_parameters(model)}
        if self.adapter is not None:
            mark = f".lora.{self.adapter}."
            state |= {name: p.detach() for name, p in model.named_parameters() if mark in f".{name}"}
        return state

    @contextmanager
    def _stands(self) -> Iterator[None]:
        model: nn.Module = self.__dict__["_model"]
        # A quantized linear may answer by another product in eval mode than the one that trains.
        training = [module for module in model.modules() if module.training and not is_quantized(module)]
        with disabled(model):
            if self.adapter is not None:
                activate(model, self.adapter)
            for module in training:
                module.training = False
            try:
                yield
            finally:
                for module in training:
                    module.training = True
