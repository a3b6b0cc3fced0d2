"""The base model and its tokenizer, loaded with errors that say what to do."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..bases import FrozenWeight, loadable, saved_as, weight_of
from ..errors import LoraError, LoraWarning, OutOfMemoryError
from .base_facts import check_place
from .quiet import quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name; auto is fp32 on a CPU and bf16 on a GPU. Raises `LoraError` for another name."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if dtype not in DTYPES:
        raise LoraError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_base(
    name: str, dtype: torch.dtype | str, quantize: str = "none", device: str | None = None,
    labels: Sequence[str] = (),
) -> Any:  # fmt: skip
    """A causal language model in eval mode: in `dtype` and on the CPU, or, where it is quantized, on `device`.

    Args:
        dtype: of all that is not quantized ("auto": as it is stored), and of the products with weights that become NF4.
        quantize: one of `bases.loadable()`, such as "nf4"; "none" takes the model as it is stored.
        device: of a quantized model; None is the GPU where there is one.
        labels: their names make it a sequence classifier instead (see `classify.load_classifier`).

    Raises:
        LoraError: nothing is there, it cannot be read, it is no causal language model, or it is stored in another
            quantization than the one asked for.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    stored, kind = check_quantization(name, quantize)
    options: dict[str, Any] = {}
    if stored is not None or quantize != "none":
        place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        options["device_map"] = {"": place if device is None else device}
    if stored is None and quantize != "none":
        skip = _heads_to_be(name) if labels else ()
        options["quantization_config"] = loadable()[quantize].load_settings(quantize, dtype, skip)
    if labels:
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: i for i, label in enumerate(labels)}
    kind_of_model = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    with _no_packed_head(name, stored if labels else None):
        model, info = _read(kind_of_model, name, dtype=dtype, output_loading_info=True, **options)
    if not labels:  # a classifier's head is new, and a pooler may be
        _check_weights(name, info)
    if getattr(model.config, "auto_map", None):
        warnings.warn(
            f"model: {name!r} brings code of its own, which is not run: it is transformers' {type(model).__name__}",
            LoraWarning, stacklevel=2,
        )  # fmt: skip
    if kind is not None:
        kind.after_loading(model)
        if isinstance(dtype, torch.dtype):
            _cast(model, dtype)
    return model


@contextmanager
def _no_packed_head(name: str, stored: str | None) -> Iterator[None]:
    """Within it, a classifier is loaded. Raises `LoraError` where the stored quantization would take its fresh head."""
    try:
        yield
    except LoraError as error:
        if stored is None or not isinstance(error.__cause__, NotImplementedError):  # a packed weight cannot be drawn
            raise
        raise LoraError(
            f"model: {name!r} is stored in {stored}, in which a fresh head cannot be made; give the model from before "
            f"it was quantized, with quantize={stored!r}"
        ) from error


def task_head(model: Any) -> list[str]:
    """The modules beside the model's body, as transformers calls it, that have parameters."""
    body = getattr(model, "base_model_prefix", "")
    return [name for name, module in model._modules.items() if name != body and any(True for _ in module.parameters())]


def _heads_to_be(name: str) -> list[str]:
    """What a classifier of this model may have to make anew, which must not be quantized: it trains whole."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        make: Any = AutoModelForSequenceClassification.from_config
        model = make(load_config(name))
    return [*task_head(model), *(found for found, _ in model.named_modules() if found.endswith("pooler"))]


def check_quantization(name: str, quantize: str) -> tuple[str | None, type[FrozenWeight] | None]:
    """How the model is stored, a quantization's name or None for not quantized, and the format that knows it.

    Raises:
        LoraError: `quantize` is unknown or asks for another quantization, or a package that it needs is missing.
    """
    known = loadable()
    if quantize != "none" and quantize not in known:
        raise LoraError(f"quantize is {quantize!r}; allowed: {', '.join(['none', *known])}")
    settings: Any = getattr(load_config(name), "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    stored, kind = (None, None) if settings is None else saved_as(settings)
    if quantize != "none" and stored not in (None, quantize):
        raise LoraError(
            f"quantize is {quantize!r}, but {name!r} is stored in {stored}; leave quantize out to take it as it is, or "
            "give the model from before it was quantized"
        )
    if quantize != "none":
        known[quantize].require(f"quantize is {quantize!r}")
    elif kind is not None:
        kind.require(f"model: {name!r} is stored in {stored}")
    return stored, kind


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer. Raises `LoraError` when there is none."""
    from transformers import AutoTokenizer

    return _read(AutoTokenizer, name, "the tokenizer of ")


def max_positions(config: Any) -> int | None:
    """How many tokens a model takes, where its config says so."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def load_config(name: str) -> Any:
    """The model's config. Raises `LoraError` when there is none."""
    from transformers import AutoConfig

    return _read(AutoConfig, name, "the config of ", bars=False)


def _read(kind: Any, name: str, what: str = "", bars: bool = True, **options: Any) -> Any:
    """kind.from_pretrained(name). A download of gigabytes needs its bar; reading a folder does not.

    Code that comes with a model is never run, whoever asks: transformers is told so, and so asks nobody.
    """
    check_place(name)
    try:
        with quiet(bars=bars and not Path(name).is_dir()):
            return kind.from_pretrained(name, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(
            f"model: {what}{name!r} does not fit into memory; quantize it, or take a smaller"
        ) from error
    except Exception as error:  # configs, headers and weights of others fail in a dozen unrelated classes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            told = "it brings code of its own (auto_map), which is never run here; give a model that transformers knows"
        elif "ignore_mismatched_sizes" in str(error):
            told = "its weights have other shapes than its config asks for; give the whole model, with its own config"
        raise LoraError(f"model: {what}{name!r} could not be loaded: {told[:500]}") from error


def _check_weights(name: str, info: dict[str, Any]) -> None:
    """Every weight must have come from the model's files: transformers draws the others at random."""
    if missing := sorted(map(str, info.get("missing_keys", ()))):
        raise LoraError(
            f"model: {name!r} lacks {len(missing)} weights that its config asks for ({', '.join(missing[:3])}, ...); "
            "give the whole model"
        )
    if left := sorted(map(str, info.get("unexpected_keys", ()))):
        warnings.warn(
            f"model: {name!r} has {len(left)} weights that its config does not ask for ({', '.join(left[:3])}, ...): "
            "they are left out", LoraWarning, stacklevel=3,
        )  # fmt: skip


def _cast(model: Any, dtype: torch.dtype) -> None:
    """What is not quantized, in `dtype`: some transformers 5 leave it as it is stored."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, module in model.named_modules():
        weight = weight_of(module)
        packed = None if weight is None or weight.quantization is None else weight.parameter
        for parameter in module._parameters.values():
            floats = parameter is not None and parameter is not packed and parameter.is_floating_point()
            if floats and not any(k in name for k in kept):
                parameter.data = parameter.data.to(dtype)
