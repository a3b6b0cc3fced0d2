"""The operators `torch.ops.lora.*`: each is told to torch in one call, on every device."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("lora", "FRAGMENT")
Function = Callable[..., Any]


def define(
    schema: str, run: Function, fake: Function, backward: Function | None = None, setup: Function | None = None
) -> None:  # fmt: skip
    """An operator by its schema; `fake` gives its outputs' shapes, `backward` and `setup` its gradients."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"lora::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"lora::{name}", backward, setup_context=setup, lib=LIBRARY)
