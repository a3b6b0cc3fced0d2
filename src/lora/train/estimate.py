"""What a training step of a recipe takes of memory, by part, before the model is loaded: from its config."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora

from ..bases import loadable, saved_as, weight_of
from ..bases.planned import PlannedLinear, planned
from ..errors import LoraError, LoraWarning
from ..tables import table
from ..targets import output_heads
from .base import DTYPES, load_config, max_positions
from .defaults import LONGEST
from .ledger import Peak, rounded, tensors_of
from .methods import put
from .quiet import quiet
from .recipe import Recipe
from .rehearse import Step, rehearse

GIB = 2**30
WORKSPACES = 3
"""Of cuBLAS: one for each pass, whose threads have a handle of their own, and one for the second stream of ours."""
WORKSPACE = {True: 32 << 20, False: 8_519_680}  # bytes, on Hopper and later or before it
HOPPER = 9


@dataclass(frozen=True)
class Estimate:
    """Bytes. `str()` is what `lora estimate` prints.

    parts: at the moment of the peak, what was there before the step first; activations: what of `parts` the passes
    made; moment: in words; dense: the largest weight that is made of a quantized one, which is one of the activations.
    """

    device: str
    model: str
    rows: int
    tokens: int
    trainable: int
    peak: int
    moment: str
    parts: dict[str, int]
    dense: int = 0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        unit, name_of_unit = (GIB, "GiB") if self.peak >= GIB else (1 << 20, "MiB")
        rows = [
            [name, f"{size / unit:.3f}", f"{100 * size / self.peak:.1f} %"]
            for name, size in self.parts.items() if size >= self.peak / 2000
        ]  # fmt: skip
        rows.append(["peak", f"{self.peak / unit:.3f}", ""])
        lines = [
            f"{self.model} on {'a GPU' if self.device == 'cuda' else 'a CPU'}: {self.rows} x {self.tokens} tokens, "
            f"{self.trainable:,} trainable parameters",
            table(["part", name_of_unit, "share"], rows),
            f"highest in: {self.moment}",
        ]
        if self.dense:
            lines.append(
                f"the largest weight made dense for its product, among them: {self.dense / unit:.3f} {name_of_unit}"
            )
        return "\n".join([*lines, *self.notes])


def estimate(
    recipe: Recipe, *, device: str | None = None, batch_size: int | None = None, tokens: int | None = None,
    padded: bool = False, whole: bool = False,
) -> Estimate:  # fmt: skip
    """The peak of a training step.

    Args:
        device: "cuda" or "cpu"; None is what is here.
        batch_size: rows of a batch, in place of the recipe's; tokens: of each row, in place of its max_length.
        padded: some rows are shorter, so that attention runs under a mask.
        whole: rehearse all layers of a model, where a few tell of the rest.

    Raises:
        LoraError: no config, one that transformers does not know, or settings that do not fit the model.
    """
    card = (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    with planned(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraWarning)  # the run says them
        config, settings = _config(recipe.model)
        model = _model(recipe, config, settings, card)
        put(recipe.adapter(), model)
        lora.prepare(model, checkpointing=recipe.gradient_checkpointing)
        rows, length = batch_size or recipe.batch_size, tokens or _tokens(recipe, config)
        step = Step(
            rows, length, card, padded, recipe.grad_accum > 1, recipe.offload, recipe.liger,
            labels_per_row=recipe.task == "classify",
        )  # fmt: skip
        before = _before(model, recipe, card)
        dense = _largest(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        peaks = _rehearsed(model, step, whole)
    moment, highest = max(peaks.items(), key=lambda found: found[1].total)
    there = {**before, **{name: size for name, size in highest.parts.items() if size}}
    return Estimate(
        "cuda" if card else "cpu", recipe.model, rows, length, trainable, sum(there.values()), moment, there, dense,
        _notes(recipe, card),
    )  # fmt: skip


def _rehearsed(model: Any, step: Step, whole: bool) -> dict[str, Peak]:
    try:
        return rehearse(model, step, whole)
    except (RuntimeError, NotImplementedError) as error:  # an operation that looks at values, or has no meta form
        raise LoraError(
            f"model: a step of {type(model).__name__} cannot be rehearsed without its values "
            f"({str(error).strip().splitlines()[0][:200]}), so there is no estimate of it"
        ) from error


def _config(name: str) -> tuple[Any, dict[str, Any] | None]:
    """The config of a folder, a hub name or a JSON file, without its quantization, and that."""
    path = Path(name)
    if path.is_file():
        from transformers import AutoConfig

        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            config = AutoConfig.for_model(content.pop("model_type"), **content)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise LoraError(
                f"model: {name!r} is not the config of a model ({type(error).__name__}: {str(error)[:200]}); give a "
                "config.json, a model's folder or its name on the hub"
            ) from error
    else:
        config = load_config(name)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        del config.quantization_config
    return config, settings if settings is None or isinstance(settings, dict) else settings.to_dict()


def _tokens(recipe: Recipe, config: Any) -> int:
    return recipe.max_length or min(max_positions(config) or LONGEST, LONGEST)


def _model(recipe: Recipe, config: Any, settings: dict[str, Any] | None, card: bool) -> Any:
    """The base on the meta device, quantized as it would be."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = torch.bfloat16 if card else torch.float32
    dtype = auto if recipe.dtype == "auto" else DTYPES[recipe.dtype]
    kind: Any = AutoModelForCausalLM if recipe.task == "generate" else AutoModelForSequenceClassification
    config.use_cache = False  # as Trainer sets it
    if recipe.task == "classify" and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=dtype)
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        raise LoraError(f"model: {recipe.model!r} cannot be built from its config: {str(error)[:300]}") from error
    model.requires_grad_(False)
    if settings is not None or recipe.quantize != "none":
        _quantize(model, recipe, settings, dtype)
    return model


def _quantize(model: Any, recipe: Recipe, settings: dict[str, Any] | None, dtype: torch.dtype) -> None:
    if settings is None:
        name: str = recipe.quantize
        kind, left_out = loadable()[name], []
    else:
        name, found = saved_as(settings)
        if found is None:
            raise LoraError(f"model: {recipe.model!r} is stored in {name}, whose memory is not known here")
        kind, left_out = found, list(settings.get("llm_int8_skip_modules") or [])
    heads = output_heads(model)
    for path, module in list(model.named_modules()):
        weight = weight_of(module)
        if weight is None or any(path == skip or path.endswith(f".{skip}") for skip in [*heads, *left_out]):
            continue
        bias = module._parameters.get("bias")
        model.set_submodule(path, PlannedLinear(kind.planned(name, weight.shape, settings), bias, dtype))


def _before(model: nn.Module, recipe: Recipe, card: bool) -> dict[str, int]:
    """What is there before a step, but for the first one: from then on the optimizer has its states."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = {id(p) for p in trained}
    base = [t for t in tensors_of(model) if id(t) not in adapters]
    weights, adapters_size = sum(t.nbytes for t in base), sum(p.nbytes for p in trained)
    held = "A and B" if recipe.method == "lora" else "prompts and gates"
    found = {"weights": weights, held: adapters_size, "optimizer": _states(trained, recipe.optimizer)}
    if recipe.grad_accum > 1:
        found["gradients"] = adapters_size
    if card:
        hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= HOPPER
        found["cuBLAS' workspaces"] = WORKSPACES * WORKSPACE[hopper]
        found["allocator's rounding"] = sum(rounded(t.nbytes) - t.nbytes for t in [*base, *trained])
    return found


def _states(trained: Sequence[Tensor], optimizer: str) -> int:
    """Both moments of each parameter, as torch's and bitsandbytes' AdamW keep them on the device."""
    sizes = [p.numel() for p in trained]
    if optimizer == "adamw_8bit":  # by blocks of 256, each with a scale; small tensors in fp32
        return sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in sizes)
    if optimizer == "paged_adamw":
        return sum(8 * n for n in sizes if n < 100_000)  # the rest is in memory that the driver pages
    return sum(8 * n for n in sizes)


def _largest(model: nn.Module) -> int:
    """Bytes of the largest dense weight that is made from a quantized one."""
    made = [m for m in model.modules() if isinstance(m, PlannedLinear)]
    return max((m.in_features * m.out_features * m.dtype.itemsize for m in made), default=0)


def _notes(recipe: Recipe, card: bool) -> list[str]:
    notes = []
    if card:
        notes.append("not in it: CUDA's own context, and what the allocator keeps in pieces")
        if recipe.offload:
            notes.append("not in it: the checkpoints, in host memory")
        if recipe.optimizer == "paged_adamw":
            notes.append("not in it: the paged states, which the driver moves to host memory when it must")
    else:
        notes.append("not in it: the interpreter and its libraries")
    return notes
