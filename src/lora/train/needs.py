"""What a recipe needs beside the library: packages, a GPU, a model that knows what is asked of it."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..bases.bitsandbytes import require_bitsandbytes
from ..errors import LoraError
from ..layers import hosts
from ..targets import output_heads
from .quiet import quiet
from .recipe import Recipe

# transformers' names for them.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit"}
_ENOUGH = 1 << 17  # elements; smaller tensors get plain states from bitsandbytes, whatever was asked for


def check_needs(recipe: Recipe) -> None:
    """Raises `LoraError` for a package or a device that the recipe needs and that is not there. Loads no model."""
    gpu = torch.cuda.is_available()
    if recipe.offload and not gpu:
        raise LoraError("offload: it moves checkpoints from a GPU to host memory, and there is no GPU; leave it out")
    if recipe.liger and find_spec("liger_kernel") is None:
        raise LoraError("liger: it needs liger_kernel; pip install 'lora-torch[fast]', or leave it out")
    if recipe.liger and not gpu:
        raise LoraError("liger: its kernels run on a GPU, and there is none; leave it out")
    if recipe.optimizer != "adamw":
        check_optimizer(recipe.optimizer, gpu)


def check_optimizer(name: str, gpu: bool) -> None:
    """One step on zeros: which devices bitsandbytes has optimizers for differs by its version and how it was built."""
    require_bitsandbytes(f"optimizer is {name!r}")
    if name == "paged_adamw" and not gpu:
        raise LoraError(
            "optimizer is 'paged_adamw', which pages its states between a GPU and host memory, and there is no GPU; "
            "allowed here: adamw, adamw_8bit"
        )
    device = "cuda" if gpu else "cpu"
    try:
        with quiet():
            optimizers: Any = import_module("bitsandbytes.optim")
            parameter = torch.nn.Parameter(torch.zeros(_ENOUGH, device=device))
            parameter.grad = torch.zeros_like(parameter)
            bits = 8 if name == "adamw_8bit" else 32
            optimizers.AdamW([parameter], optim_bits=bits, is_paged=name == "paged_adamw").step()
    except Exception as error:
        raise LoraError(
            f"optimizer is {name!r}, which the installed bitsandbytes cannot run on {device} ({error!r}); upgrade it, "
            "or use adamw"
        ) from error


def check_liger(model: Any) -> None:
    """Raises `LoraError` where Liger's kernels would do nothing, or leave an adapter out, without a word."""
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = model.config.model_type
    if kind not in known:
        raise LoraError(f"liger: it has no kernels for a model of type {kind!r}; leave it out")
    heads = set(output_heads(model))
    for name, _, adapters in hosts(model):
        if name in heads and not adapters.weight_is_seen:
            raise LoraError(
                f"liger: its loss reads the weight of {name!r} without calling it, so an adapter there would not "
                "train; leave it out of targets, or leave liger out"
            )
