"""Lightning's checkpoints without the base."""

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import LoraError
from ..files.fit import few
from ..layers import adapters_of

if TYPE_CHECKING:
    Callback: Any
elif "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback  # the same under its older name
else:
    from lightning.pytorch import Callback


class LightningAdapters(Callback):  # type: ignore[misc]  # of one of two packages, so Any
    """A callback for `lightning.Trainer`: its checkpoints hold the adapters, and what else of the module trains.

    The base's frozen parameters are left out and are the module's own at a resume, so make the module as before it:
    the same base, the same `lora.inject`. `LightningModule.load_from_checkpoint` needs `strict=False` with them.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not adapter_keys(pl_module):
            raise LoraError("pl_module: it carries no adapter; lora.inject one into its model, in __init__")
        if light := [c for c in trainer.callbacks if getattr(c, "save_weights_only", False)]:
            raise LoraError(
                f"callbacks: {type(light[0]).__name__}(save_weights_only=True) asks no callback, and would write the "
                "base; leave save_weights_only out"
            )
        pl_module.strict_loading = False  # what is missing is the base; what must be there is checked below

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name in base_keys(pl_module) & state.keys():
            del state[name]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state, needed = checkpoint["state_dict"], pl_module.state_dict().keys() - base_keys(pl_module)
        lost, more = sorted(needed - state.keys()), sorted(state.keys() - pl_module.state_dict().keys())
        if lost or more:
            found = {"are missing": lost, "are left over": more}
            told = "; ".join(f"{len(names)} {what}: {few(names)}" for what, names in found.items() if names)
            raise LoraError(
                f"checkpoint: its tensors are not those of this module; {told}; inject the adapters as they were"
            )


def adapter_keys(module: nn.Module) -> set[str]:
    """The names in `module.state_dict()` that are of adapters."""
    return {
        f"{prefix}.lora.{key}" if prefix else f"lora.{key}"
        for prefix, inner in module.named_modules(remove_duplicate=False)
        if (adapters := adapters_of(inner)) is not None
        for key in adapters.state_dict()
    }


def base_keys(module: nn.Module) -> set[str]:
    """The names there of frozen parameters that are no adapter's."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return frozen - adapter_keys(module)
