"""The base model and its tokenizer, loaded with errors that say what to do."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..bases.quantizer import forget_reading
from ..errors import LoraError
from ..layers.frozen import is_quantized
from .quiet import quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZATIONS = ("none", "nf4", "int8")
BITSANDBYTES = ("nf4", "fp4", "int8")  # what it stores


def pick_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name; auto is fp32 on a CPU and bf16 on a GPU. Raises `LoraError` for another name."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if dtype not in DTYPES:
        raise LoraError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_base(name: str, dtype: torch.dtype | str, quantize: str = "none", device: str | None = None) -> Any:
    """A causal language model in eval mode: in `dtype` and on the CPU, or, where it is quantized, on `device`.

    Args:
        dtype: of all that is not quantized ("auto": as it is stored), and of the products with weights that become NF4.
        quantize: "nf4" or "int8" by bitsandbytes; "none" takes the model as it is stored, quantized or not.
        device: of a quantized model; None is the GPU where there is one.

    Raises:
        LoraError: nothing is there, it cannot be read, it is no causal language model, or it is stored in another
            quantization than the one asked for.
    """
    from transformers import AutoModelForCausalLM

    stored = check_quantization(name, quantize)
    options: dict[str, Any] = {}
    if stored is not None or quantize != "none":
        place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        options["device_map"] = {"": place if device is None else device}
    try:
        with quiet(bars=_downloads(name)):
            if stored is None and quantize != "none":
                options["quantization_config"] = _settings(quantize, dtype)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise LoraError(f"model: {name!r} could not be loaded: {_first_line(error)}") from error
    if stored in BITSANDBYTES:
        forget_reading(model)
        if isinstance(dtype, torch.dtype):
            _cast(model, dtype)
    return model


def check_quantization(name: str, quantize: str) -> str | None:
    """How the model is stored: "nf4", "fp4", "int8", another quantizer's name, or None for not quantized.

    Raises:
        LoraError: `quantize` is unknown or asks for another quantization, or bitsandbytes is needed and missing.
    """
    if quantize not in QUANTIZATIONS:
        raise LoraError(f"quantize is {quantize!r}; allowed: {', '.join(QUANTIZATIONS)}")
    stored = _stored_quantization(name)
    if quantize != "none" and stored not in (None, quantize):
        raise LoraError(
            f"quantize is {quantize!r}, but {name!r} is stored in {stored}; leave quantize out to take it as it is, or "
            "give the model from before it was quantized"
        )
    if quantize != "none":
        require_bitsandbytes(f"quantize is {quantize!r}")
    elif stored in BITSANDBYTES:
        require_bitsandbytes(f"model: {name!r} is stored in {stored}")
    return stored


def require_bitsandbytes(why: str) -> None:
    """Raises `LoraError` where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise LoraError(f"{why}, which needs bitsandbytes; pip install 'lora-torch[quant]'")


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
    most = getattr(_config(name).get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def _config(name: str) -> Any:
    from transformers import AutoConfig

    _check_place(name, "model")
    try:
        with quiet():
            return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoraError(f"model: the config of {name!r} could not be loaded: {_first_line(error)}") from error


def _stored_quantization(name: str) -> str | None:
    settings = getattr(_config(name), "quantization_config", None)
    if settings is None:
        return None
    found: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if found.get("load_in_8bit") else str(found.get("quant_method", "an unknown quantization"))


def _settings(quantize: str, dtype: torch.dtype | str) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _cast(model: Any, dtype: torch.dtype) -> None:
    """What is not quantized, in `dtype`: some transformers 5 leave it as it is stored."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, module in model.named_modules():
        for own_name, parameter in module._parameters.items():
            packed = own_name == "weight" and is_quantized(module)
            if parameter is None or packed or not parameter.is_floating_point() or any(k in name for k in kept):
                continue
            parameter.data = parameter.data.to(dtype)


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
