"""Quantizers whose modules no format takes yet: they are refused by name."""

from typing import Any

from torch import nn

from .weight import weight_of

INSTEAD = "load the model in 16 bits, or with BitsAndBytesConfig(load_in_4bit=True) or (load_in_8bit=True)"
TO_SKIP = "BitsAndBytesConfig(llm_int8_skip_modules=[...])"

OTHER_QUANTIZERS = {  # by the package that the module or its weight comes from
    "gptqmodel": "GPTQ", "auto_gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "torchao": "torchao",
    "optimum.quanto": "quanto", "aqlm": "AQLM", "vptq": "VPTQ", "eetq": "EETQ", "auto_round": "AutoRound",
    "compressed_tensors": "compressed-tensors", "transformers.integrations": "a transformers integration",
}  # fmt: skip


def other_quantizer(module: nn.Module) -> str:
    """The words for a module that another quantizer made; "" for any other."""
    weight = weight_of(module)
    if weight is not None and weight.quantization is not None:
        return ""  # a format takes it
    # Of the classes only those of modules: transformers' models have a mixin from its integrations.
    classes = [c for c in type(module).__mro__ if issubclass(c, nn.Module)]
    kinds: list[Any] = [*classes, *(type(p) for p in module._parameters.values() if p is not None)]
    for package, name in OTHER_QUANTIZERS.items():
        if any(c.__module__ == package or c.__module__.startswith(package + ".") for c in kinds):
            return f". This one is quantized by {name}, which is not supported: {INSTEAD}"
    return ""
