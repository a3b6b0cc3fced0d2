"""The base model and its tokenizer, loaded with errors that say what to do."""

from pathlib import Path
from typing import Any

import torch

from ..errors import LoraError
from .quiet import quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name; auto is fp32 on a CPU and bf16 on a GPU. Raises `LoraError` for another name."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if dtype not in DTYPES:
        raise LoraError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_base(name: str, dtype: torch.dtype | str) -> Any:
    """A causal language model in `dtype` ("auto": as it is stored), on the CPU, in eval mode.

    Raises:
        LoraError: nothing is there, it cannot be read, or it is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    _check_place(name, "model")
    try:
        with quiet(bars=_downloads(name)):
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise LoraError(f"model: {name!r} could not be loaded: {_first_line(error)}") from error


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer. Raises `LoraError` when there is none."""
    from transformers import AutoTokenizer

    _check_place(name, "model")
    try:
        with quiet(bars=_downloads(name)):
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoraError(f"model: the tokenizer of {name!r} could not be loaded: {_first_line(error)}") from error


def max_positions(name: str) -> int | None:
    """How many tokens the model takes, where its config says so. Raises `LoraError` when it has no readable config."""
    from transformers import AutoConfig

    _check_place(name, "model")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoraError(f"model: the config of {name!r} could not be loaded: {_first_line(error)}") from error
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def _check_place(name: str, argument: str) -> None:
    """A mistyped path would be asked of the hub, whose answer speaks of repository ids."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoraError(f"{argument}: the folder {name!r} has no config.json, so it is not a saved model")
    elif path.exists():
        raise LoraError(f"{argument}: {name!r} is a file; give the model's folder or its name on the hub")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LoraError(f"{argument}: there is no folder {name!r}; give a saved model's folder or a name on the hub")


def _downloads(name: str) -> bool:
    """A download of gigabytes needs its bar; reading a folder does not."""
    return not Path(name).is_dir()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
