"""The recipe: every choice of a training run, as one validated model.

Field descriptions are the text of `lora train --help`. The adapter's own settings come from `LoraConfig`, all of them.
What is left open is decided in `defaults`. Nothing here imports torch.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator
from pydantic_core import ErrorDetails

from ..config import SETTINGS, LoraConfig, PromptConfig
from ..errors import LoraError, LoraWarning, near
from . import defaults, methods
from .names import understood
from .recipe_file import to_yaml
from .sources import written

# What a run writes beside the adapter: the recipe as it was run, and the run's numbers.
RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"

_MOST = 1 << 30  # of what is counted: steps, rows, tokens
_RANKS = 1 << 16  # no matrix has more to give
_ALPHAS = 1e6
_TOLD, _LENGTH = 20, 300  # mistakes in one message, and the characters of each


class _Job(BaseModel):
    model_config = {"extra": "forbid", "frozen": True, "allow_inf_nan": False, "protected_namespaces": ()}

    model: str = Field(description="Base model: a folder, or a name on the hub.", min_length=1)
    data: str = Field(
        description="Training rows: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, gzipped or not, a folder of "
        "them or one that `datasets` saved, or a hub dataset (name[:config][:split]).",
        min_length=1,
    )
    out: str = Field(description="Folder for the finished adapter.", min_length=1)
    eval_data: str | None = Field(None, description="Held-out rows, whose loss is measured on the way.")
    eval_share: float | None = Field(
        None, gt=0, le=0.5, description="Share of the rows to hold out, in place of eval_data."
    )


if TYPE_CHECKING:

    class _AdapterJob(_Job):
        r: int
        targets: str | list[str] | None
        alpha: float | None
        rslora: bool
        layers: int | list[int] | None
        train: list[str]

else:  # a field for each of `LoraConfig`
    _TYPES = get_type_hints(LoraConfig)
    _FIELDS = {name: (_TYPES[name], Field(s.default, description=s.help)) for name, s in SETTINGS.items()}
    # Where a run's defaults are not those of `lora.inject`.
    _FIELDS["r"] = (int, Field(defaults.R, le=_RANKS, description=SETTINGS["r"].help))
    _FIELDS["targets"] = (
        _TYPES["targets"], Field(defaults.TARGETS, description=SETTINGS["targets"].help.partition(" [default")[0] + ".")
    )  # fmt: skip
    _FIELDS["layers"] = (
        _TYPES["layers"], Field(
            None, description="Indices of the layers to adapt, such as 0,1 [default: all]; with method llama-adapter "
            "how many, from the top [default: 30, or all]."
        )
    )  # fmt: skip
    _FIELDS["alpha"] = (
        float | None, Field(None, le=_ALPHAS, description="Scale: the update is multiplied by alpha / r [default: 32].")
    )  # fmt: skip
    _AdapterJob = create_model("_AdapterJob", __base__=_Job, **_FIELDS)


class Recipe(_AdapterJob):
    """What to train, on what, how, and where the adapter goes.

    Build it with `Recipe.of(...)` or `load_recipe(path)`: both report every mistake at once as a `LoraError`.
    """

    method: Literal["lora", "llama-adapter"] = Field(
        "lora", description="What trains: updates of linear layers, or prompts beside the attention (LLaMA-Adapter)."
    )
    prompt_length: int = Field(
        defaults.PROMPTS, ge=1, le=_RANKS, description="Learned prompts of each layer, with method llama-adapter."
    )
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="Passes over the data [default: 1, unless max_steps is given]."
    )
    max_steps: int | None = Field(None, ge=1, le=_MOST, description="Optimizer steps, in place of epochs.")
    batch_size: int = Field(defaults.BATCH_SIZE, ge=1, le=_MOST, description="Rows per device in one forward pass.")
    grad_accum: int = Field(1, ge=1, le=_MOST, description="Forward passes per optimizer step.")
    lr: float | None = Field(
        None, gt=0, le=10, description="Peak learning rate of AdamW [default: by the size of the base]."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="What follows the warm-up.")
    warmup_steps: float | None = Field(
        None, ge=0, le=_MOST,
        description="Steps of linear warm-up; below 1, a share of all steps [default: 3 % of them].",
    )  # fmt: skip
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 turns clipping off.")

    task: Literal["generate", "classify"] = Field(
        "generate", description="Learn to answer, or to give each text one of a few labels (a head that trains whole)."
    )
    template: Literal["auto", "chat", "plain", "inst"] = Field(
        "auto",
        description="How a prompt is written; auto is the tokenizer's chat template, or plain text where it has none.",
    )
    packing: bool = Field(False, description="Fill each row of a batch with several short ones, which do not mix.")
    group_by_length: bool = Field(
        False, description="Put rows of like length into one batch: less padding, and somewhat worse answers."
    )
    max_length: int | None = Field(
        None, ge=2, le=_MOST, description="Longest row in tokens [default: what the model takes, at most 2048]."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Type of the frozen weights; auto is fp32 on a CPU and bf16 on a GPU."
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="Load the base quantized by bitsandbytes; one that is stored so is taken as it is."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seeds the adapter, the row order and the dropout.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, slower steps.")
    offload: bool = Field(
        False, description="Keep the checkpoints in pinned host memory (with gradient_checkpointing, on a GPU)."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw"] = Field(
        "adamw",
        description="AdamW by torch, or by bitsandbytes with its states in 8 bits or paged to host memory when tight.",
    )
    liger: bool = Field(False, description="Run Liger's kernels in the model (on a GPU).")
    fit: bool = Field(False, description="Choose the largest batch_size that fits into memory; grad_accum follows.")
    eval_every: int | None = Field(
        None, ge=1, le=_MOST, description="Steps between two evaluations [default: each epoch]."
    )
    early_stop: int | None = Field(
        None, ge=1, le=_MOST, description="Stop after so many evaluations in a row that did not better the loss."
    )
    samples: int = Field(3, ge=0, le=1000, description="Held-out prompts answered at each evaluation, for the report.")
    save_every: int | None = Field(
        None, ge=1, le=_MOST, description="Steps between two checkpoints [default: a twentieth of the run]."
    )
    max_bad_steps: int = Field(
        5, ge=1, le=_MOST, description="Stop after so many steps in a row whose loss or gradient is NaN or infinite."
    )
    check: bool = Field(True, description="Read the adapter back at the end, and check that it learned and can stop.")
    track: list[str] = Field([], description="Send metrics there as well: tensorboard, trackio, wandb.")
    log_every: int = Field(10, ge=1, le=_MOST, description="Steps between two reports of the loss.")

    @field_validator(*SETTINGS)
    @classmethod
    def _setting_fits(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        wrong = list(SETTINGS[name].check(name, value))
        most = {"rank_pattern": _RANKS, "alpha_pattern": _ALPHAS}.get(name)
        if most is not None:
            wrong += [f"{name}: {key!r} has more than {most:,}" for key, each in value.items() if each > most]
        if wrong:
            raise ValueError("\n  - ".join(wrong))
        return value

    @field_validator("model", "data", "out", "eval_data")
    @classmethod
    def _names_something(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError(f"a path or name holds no NUL byte, and there is one in {value!r:.80}")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> "Recipe":
        mistakes = []
        try:
            self.adapter()
        except LoraError as error:
            mistakes.append(str(error))
        if self.eval_data is not None and self.eval_share is not None:
            mistakes.append("eval_data and eval_share both say what is held out: give one")
        if self.epochs is not None and self.max_steps is not None:
            mistakes.append(f"epochs={self.epochs:g} and max_steps={self.max_steps} both set the length: give one")
        if self.max_steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.max_steps:
            mistakes.append(
                f"warmup_steps={self.warmup_steps} leaves nothing of max_steps={self.max_steps}: lower warmup_steps"
            )
        if self.offload and not self.gradient_checkpointing:
            mistakes.append("offload moves checkpoints, and there are none: set gradient_checkpointing as well")
        if mistakes:
            raise ValueError("\n  - ".join(mistakes))
        return self

    def adapter(self) -> LoraConfig | PromptConfig:
        """The settings of what trains; `methods.put` puts it into a base."""
        return methods.config_of(self)

    @classmethod
    def of(cls, **fields: Any) -> "Recipe":
        """A validated recipe from keyword arguments. Raises `LoraError` that lists every mistake."""
        return load_recipe(None, fields)

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back to an equal recipe; unset fields are left out."""
        return to_yaml(self.model_dump(exclude_none=True, exclude=methods.foreign(self.method)))


_EITHER = [("max_steps", "epochs"), ("dora", "update"), ("eval_share", "eval_data")]  # two ways to say one thing


def load_recipe(
    source: str | Path | None, overrides: Mapping[str, Any] | None = None, *, recipes: str | Path | None = None
) -> Recipe:
    """A recipe from a file or by name, with `overrides` on top of what it says.

    Giving `max_steps` over a file's `epochs`, or the reverse, replaces it: the two are one choice, as dora and update.
    Names that other tools have for a field are taken, and a warning says which.

    Args:
        source: a YAML or JSON file, the name of a shipped recipe (`lora recipes` lists them), or None.
        recipes: a file of recipes by name, such as FinLoRA's, of which `source` names one.

    Raises:
        LoraError: no such recipe, not a mapping, an unknown key, or a value out of range; all mistakes at once.
    """
    if source is None and recipes is not None:
        raise LoraError("recipes: give the name of one of its recipes as well; lora recipes --recipes FILE lists them")
    said = {} if source is None else written(source, None if recipes is None else Path(recipes))
    fields, notes = _understood(said)
    over, more = _understood(overrides or {}, typed=True)
    for given, replaced in _EITHER + [pair[::-1] for pair in _EITHER]:
        if given in over and replaced not in over:
            fields.pop(replaced, None)
    if told := list(dict.fromkeys([*notes, *more])):
        warnings.warn("names of other tools: " + ", ".join(told), LoraWarning, stacklevel=2)
    return _validated(fields | over, "recipe" if source is None else str(source))


def _understood(given: Mapping[str, Any], typed: bool = False) -> tuple[dict[str, Any], list[str]]:
    return understood(given, Recipe.model_fields, typed)


def _validated(fields: dict[str, Any], source: str) -> Recipe:
    if isinstance(fields.get("train"), str):  # what a YAML author writes for one module
        fields["train"] = [fields["train"]]
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        mistakes: dict[str, str] = {}  # one a field: a union reports each of its alternatives
        for each in error.errors(include_url=False):
            field = str(each["loc"][0]) if each["loc"] else ""
            if field not in mistakes and len(mistakes) < _TOLD:
                mistakes[field] = _clipped(_sentence(field, each))
        count = len({each["loc"][:1] for each in error.errors(include_url=False)})
    told = [*mistakes.values(), *([f"and {count - _TOLD} more"] if count > _TOLD else [])]
    raise LoraError("\n  - ".join([f"{source}: {count} mistake{'s' if count > 1 else ''}", *told]))


def _clipped(text: str) -> str:
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH // 2]} ... {text[-_LENGTH // 2 :]}"


def _sentence(field: str, error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key {field!r}{near(field, Recipe.model_fields)}"
    if error["type"] == "missing":
        return f"{field} is missing: {Recipe.model_fields[field].description}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    message = error["msg"].removeprefix("Input should be ")
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return f"{field} is {_shown(error['input'])}; it must be {message} ({Recipe.model_fields[field].description})"


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of some {value.bit_length() * 3 // 10:,} digits"
