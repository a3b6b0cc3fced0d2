"""Who asks a module that carries adapters for what is inside, where the answer would be used to the adapters' harm.

Two libraries would do so without a word: PEFT, which freezes what it does not know and puts its own modules around
ours; and `save_pretrained`, which writes adapters under names that `from_pretrained` leaves out. Both come by way of
torch's own walks, which ask each module, so the adapters hear of them and no class of others need be changed.
"""

import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING

import torch

from ..errors import LoraError, LoraWarning

if TYPE_CHECKING:
    from .host import Adapter

_TORCH = "torch.nn.modules.module"


def _asker() -> FrameType | None:
    """The code outside torch's modules that began a walk, which came here by a method of the adapters'; None while
    torch traces it."""
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_globals.get("__name__") == _TORCH:
        frame = frame.f_back
    return frame


def refuse_peft(adapters: Iterable[str]) -> None:
    """Called at each walk over modules or parameters."""
    if "peft" not in sys.modules or (frame := _asker()) is None:
        return
    if frame.f_globals.get("__name__", "").partition(".")[0] == "peft":
        raise LoraError(
            f"model: it carries {', '.join(adapters)}, and PEFT would freeze it and wrap its modules; "
            "leave peft_config out and train this one, or lora.remove(model), or lora.merge(model, "
            "unload=True), before PEFT comes"
        )


def tell_save_pretrained(records: Iterable["Adapter"]) -> None:
    """Called when a state dict is asked for of a module that is not merged. Each adapter is told of once."""
    new = [record for record in records if not record.told]
    if not new or (frame := _asker()) is None or frame.f_code.co_name != "save_pretrained":
        return
    for record in new:
        record.told = True
    caller = frame.f_back or frame
    warnings.warn_explicit(
        f"save_pretrained: {', '.join(record.name for record in new)} will not come back by from_pretrained, which "
        "gives the base alone. lora.save(model, PATH) writes the adapter; lora.merge(model, unload=True) first "
        "makes a model that has its effect; lora.integrations.adapters_only(trainer) has a trainer's checkpoints hold "
        "the adapter alone",
        LoraWarning,
        caller.f_code.co_filename,
        caller.f_lineno,
    )
