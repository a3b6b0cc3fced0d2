"""The recipe: every choice of a training run, as one validated model.

Field descriptions are the text of `lora train --help`. The adapter's own settings come from `LoraConfig`, all of them.
Nothing here imports torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator
from pydantic_core import ErrorDetails

from ..config import SETTINGS, LoraConfig
from ..errors import LoraError, near

# What a run writes beside the adapter: the recipe as it was run, and the run's numbers.
RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"


class _Job(BaseModel):
    model_config = {"extra": "forbid", "frozen": True, "allow_inf_nan": False, "protected_namespaces": ()}

    model: str = Field(description="Base model: a folder, or a name on the hub.", min_length=1)
    data: str = Field(
        description="Training rows: a .jsonl, .json, .csv, .parquet or .txt file, or a hub dataset (name[:split]).",
        min_length=1,
    )
    out: str = Field(description="Folder for the finished adapter.", min_length=1)
    eval_data: str | None = Field(None, description="Held-out rows, whose loss is measured on the way.")
    eval_share: float | None = Field(
        None, gt=0, le=0.5, description="Share of the rows to hold out, in place of eval_data."
    )


if TYPE_CHECKING:
    _AdapterJob = _Job
else:  # a field for each of `LoraConfig`
    _TYPES = get_type_hints(LoraConfig)
    _FIELDS = {name: (_TYPES[name], Field(s.default, description=s.help)) for name, s in SETTINGS.items()}
    _AdapterJob = create_model("_AdapterJob", __base__=_Job, **_FIELDS)


class Recipe(_AdapterJob):
    """What to train, on what, how, and where the adapter goes.

    Build it with `Recipe.of(...)` or `load_recipe(path)`: both report every mistake at once as a `LoraError`.
    """

    epochs: float | None = Field(
        None, gt=0, description="Passes over the data [default: 1, unless max_steps is given]."
    )
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, in place of epochs.")
    batch_size: int = Field(8, ge=1, description="Rows per device in one forward pass.")
    grad_accum: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    lr: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="What follows the warm-up.")
    warmup_steps: int | None = Field(None, ge=0, description="Steps of linear warm-up [default: 3 % of all steps].")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 turns clipping off.")

    task: Literal["generate", "classify"] = Field(
        "generate", description="Learn to answer, or to give each text one of a few labels (a head that trains whole)."
    )
    template: Literal["auto", "chat", "plain", "inst"] = Field(
        "auto",
        description="How a prompt is written; auto is the tokenizer's chat template, or plain text where it has none.",
    )
    packing: bool = Field(False, description="Fill each row of a batch with several short ones, which do not mix.")
    group_by_length: bool = Field(True, description="Put rows of like length into one batch: less padding.")
    max_length: int | None = Field(
        None, ge=2, description="Longest row in tokens [default: what the model takes, at most 2048]."
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
    eval_every: int | None = Field(None, ge=1, description="Steps between two evaluations [default: each epoch].")
    early_stop: int | None = Field(
        None, ge=1, description="Stop after so many evaluations in a row that did not better the loss."
    )
    samples: int = Field(3, ge=0, description="Held-out prompts answered at each evaluation, for the report.")
    save_every: int | None = Field(
        None, ge=1, description="Steps between two checkpoints [default: a twentieth of the run]."
    )
    max_bad_steps: int = Field(
        5, ge=1, description="Stop after so many steps in a row whose loss or gradient is NaN or infinite."
    )
    check: bool = Field(True, description="Read the adapter back at the end, and check that it learned and can stop.")
    track: list[str] = Field([], description="Send metrics there as well: tensorboard, trackio, wandb.")
    log_every: int = Field(10, ge=1, description="Steps between two reports of the loss.")

    @field_validator(*SETTINGS)
    @classmethod
    def _setting_fits(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        wrong = list(SETTINGS[name].check(name, value))
        if wrong:
            raise ValueError("\n  - ".join(wrong))
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> "Recipe":
        mistakes = []
        try:
            self.adapter()
        except LoraError as error:
            mistakes.append(str(error))
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

    def adapter(self) -> LoraConfig:
        """What `lora.inject` takes as `config`."""
        return LoraConfig(**{name: getattr(self, name) for name in SETTINGS})

    @classmethod
    def of(cls, **fields: Any) -> "Recipe":
        """A validated recipe from keyword arguments. Raises `LoraError` that lists every mistake."""
        return load_recipe(None, fields)

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back to an equal recipe; unset fields are left out."""
        import yaml

        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)


_EITHER = [("max_steps", "epochs"), ("dora", "update")]  # two ways to say one thing


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML or JSON file (or none), with `overrides` on top of what the file says.

    Giving `max_steps` over a file's `epochs`, or the reverse, replaces it: the two are one choice, as dora and update.

    Raises:
        LoraError: no such file, not a mapping, an unknown key, or a value out of range; all mistakes at once.
    """
    fields: dict[str, Any] = {} if path is None else _read_mapping(Path(path))
    overrides = dict(overrides or {})
    for given, replaced in _EITHER + [pair[::-1] for pair in _EITHER]:
        if given in overrides and replaced not in overrides:
            fields.pop(replaced, None)
    fields |= overrides
    if isinstance(fields.get("train"), str):  # what a YAML author writes for one module
        fields["train"] = [fields["train"]]
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        mistakes: dict[str, str] = {}  # one a field: a union reports each of its alternatives
        for each in error.errors():
            field = str(each["loc"][0]) if each["loc"] else ""
            mistakes.setdefault(field, _sentence(field, each))
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    raise LoraError("\n  - ".join([f"{'recipe' if path is None else path}: {count}", *mistakes.values()]))


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key given twice: the first value would be lost without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise LoraError(f"recipe: there is no file {str(path)!r}; give a YAML or JSON file, or flags alone")
    try:
        text = path.read_text(encoding="utf-8")
        # JSON indented with tabs is not YAML, so each suffix gets its own parser.
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise LoraError(f"recipe {str(path)!r} is not valid YAML or JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoraError(f"recipe {str(path)!r} holds {type(content).__name__}; it must be a mapping of field: value")
    return {str(key): value for key, value in content.items()}


def _sentence(field: str, error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key {field!r}{near(field, Recipe.model_fields)}"
    if error["type"] == "missing":
        return f"{field} is missing: {Recipe.model_fields[field].description}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    message = error["msg"].removeprefix("Input should be ")
    return f"{field} is {error['input']!r}; it must be {message} ({Recipe.model_fields[field].description})"
