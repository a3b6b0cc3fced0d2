"""What other tools call a recipe's settings: PEFT, TRL and transformers, Axolotl, LLaMA-Factory, Unsloth, FinLoRA.

A name that means one of our fields is taken and said. One whose meaning we lack is refused by name, with what to do.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import LoraError
from .readings import (
    OFF,
    TRUE,
    Fields,
    Reading,
    as_,
    bits,
    checkpointing,
    choice,
    dataset,
    if_true,
    init,
    method,
    only,
    ratio,
    refused,
    share,
    steps,
    targets,
    trackers,
)  # fmt: skip


def understood(given: Mapping[str, Any], ours: Iterable[str], typed: bool = False) -> tuple[Fields, list[str]]:
    """The settings in our words, and a sentence for each that had another name.

    What is neither ours nor known from elsewhere stays as it is, for the recipe to refuse.

    Args:
        typed: they are flags or arguments of ours, not a file that another tool may have written.

    Raises:
        LoraError: settings whose meaning we lack, or two names of one field with two values; all of them at once.
    """
    own = set(ours)
    fields: Fields = {}
    said_by: dict[str, str] = {}
    notes, mistakes = [], []
    theirs = not typed and any(name not in own and name in KNOWN for name in given)
    for name, value in given.items():
        reading = None if name in own and not _foreign_value(name, value, theirs) else KNOWN.get(name)
        try:
            meant = {name: value} if reading is None else reading(name, value)
        except LoraError as error:
            mistakes.append(str(error))
            continue
        for field, new in meant.items():
            if field in fields and not _same(fields[field], new):
                mistakes.append(
                    f"{said_by[field]} is {fields[field]!r:.80} and {name} is {new!r:.80}, and both mean {field}: "
                    "give one"
                )
            fields[field], said_by[field] = new, name
        if reading is not None:
            nothing = _NO_LIMIT if name == "max_steps" else "changes nothing here"
            notes.append(f"{name} is {_words(meant, value)} here" if meant else f"{name} {nothing}")
    if mistakes:
        raise LoraError("\n  - ".join([f"names of other tools: {len(mistakes)} refused", *mistakes]))
    return fields, notes


def is_switch(name: str) -> bool:
    """Whether a setting of another tool is true or false, so that a flag of that name may stand alone."""
    return name in _SWITCHES


def _words(meant: Fields, given: Any) -> str:
    """The fields, with their values where these are written otherwise."""
    return " and ".join(field if value == given else f"{field}={value!s:.80}" for field, value in meant.items())


def _same(one: Any, other: Any) -> bool:
    def plain(value: Any) -> Any:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return value

    return bool(plain(one) == plain(other))


def _foreign_value(name: str, value: Any, theirs: bool) -> bool:
    """Whether a name that is ours as well has a value that only others write; `theirs`: among names of others."""
    if name not in _OUR_NAMES_ELSEWHERE or (name in _ONLY_AMONG_THEIRS and not theirs):
        return False
    return str(value) in _OUR_NAMES_ELSEWHERE[name]


_DTYPE = choice(
    "dtype", float32="fp32", float="fp32", bfloat16="bf16", float16="fp16", half="fp16", fp32="fp32", bf16="bf16",
    fp16="fp16", auto="auto",
)  # fmt: skip
_OPTIMIZER = choice(
    "optimizer", adamw_torch="adamw", adamw_torch_fused="adamw", adamw_hf="adamw", adamw_bnb_8bit="adamw_8bit",
    adamw_8bit="adamw_8bit", paged_adamw="paged_adamw", paged_adamw_32bit="paged_adamw",
)  # fmt: skip
_SCHEDULE = choice("schedule", constant_with_warmup="constant", linear="linear", cosine="cosine", constant="constant")


def _each(names: str, reading: Reading) -> dict[str, Reading]:
    return dict.fromkeys(names.split(), reading)


_SAME: dict[str, str] = {  # our field: what others call it
    "model": "base_model model_name model_name_or_path model_id model_path pretrained_model_name_or_path",
    "out": "output_dir output_path save_dir",
    "lr": "learning_rate",
    "prompt_length": "adapter_len",
    "epochs": "num_epochs num_train_epochs n_epochs",
    "batch_size": "micro_batch_size per_device_train_batch_size per_device_batch_size train_batch_size",
    "grad_accum": "gradient_accumulation_steps gradient_accumulation grad_accum_steps",
    "r": "lora_r lora_rank rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "bias": "lora_bias",
    "rslora": "use_rslora peft_use_rslora",
    "dora": "use_dora peft_use_dora",
    "train": "modules_to_save lora_modules_to_save additional_target",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform peft_layers_to_transform adapter_layers",
    "max_length": "sequence_len max_seq_length max_seq_len cutoff_len model_max_length",
    "packing": "sample_packing",
    "max_grad_norm": "gradient_clipping grad_clip",
    "seed": "random_state random_seed",
    "log_every": "logging_steps",
    "early_stop": "early_stopping_patience",
    "liger": "use_liger_kernel use_liger enable_liger_kernel",
    "eval_data": "eval_dataset eval_file validation_file eval_path",
    "warmup_steps": "num_warmup_steps",
}

KNOWN: dict[str, Reading] = {
    **{name: as_(field) for field, names in _SAME.items() for name in names.split()},
    **_each("data_path dataset_path train_file train_path dataset dataset_name datasets", dataset),
    **_each("target_modules lora_target_modules lora_target", targets),
    **_each("quant_bits quantization_bit bits", bits),
    **_each("load_in_4bit", if_true("quantize", "nf4")),
    **_each("load_in_8bit", if_true("quantize", "int8")),
    **_each("lora_target_linear", if_true("targets", "all-linear")),
    **_each("adapter peft_type finetuning_type", method),
    **_each("lr_scheduler_type lr_scheduler", _SCHEDULE),
    **_each("optim optimizer", _OPTIMIZER),
    **_each("torch_dtype dtype", _DTYPE),
    **_each("bf16", if_true("dtype", "bf16")),
    **_each("fp16", if_true("dtype", "fp16")),
    **_each("val_set_size test_size val_size", share),
    **_each("warmup_ratio", ratio),
    **_each("max_steps", steps("max_steps")),
    **_each("save_steps", steps("save_every")),
    **_each("eval_steps", steps("eval_every")),
    **_each("init_lora_weights", init),
    **_each("use_gradient_checkpointing gradient_checkpointing", checkpointing),
    **_each("report_to", trackers),
    **_each("task_type", choice("task", causal_lm="generate", seq_cls="classify")),
    # What is so here in any case, or refused.
    **_each("stage", only(["sft"], "this trains on examples; docs/integrations.md has other trainers")),
    **_each("do_train", only(TRUE, "lora eval and lora generate do the rest")),
    **_each("full_finetuning", only(OFF, "this trains low-rank adapters")),
    **_each("fan_in_fan_out inference_mode overwrite_cache", only([*TRUE, *OFF], "it is found by itself")),
    **_each("trust_remote_code", only(OFF, "code that comes with a model is never run")),
    **_each("train_on_inputs train_on_prompt", only(OFF, 'the loss falls on answers; {"text"} rows train whole')),
    **_each("completion_only_loss assistant_only_loss", only(TRUE, 'it is so; {"text"} rows train whole')),
    **_each("chat_template", only(["tokenizer_default", *OFF], "the model's own is used; template: plain has none")),
    **_each("strict gradient_checkpointing_kwargs ddp_find_unused_parameters", only(OFF, "leave it out")),
    **_each("save_strategy evaluation_strategy eval_strategy logging_strategy",
            only(["steps"], "save_every, eval_every and log_every count steps")),
    **_each("save_total_limit", refused("the newest checkpoint and the best are kept")),
    **_each("load_best_model_at_end", refused("the best step is kept; early_stop stops after it")),
    **_each("resume_from_checkpoint", only(OFF, "give the command --resume auto, or --resume FOLDER")),
    **_each("overwrite_output_dir", only(OFF, "give the command --force")),
    **_each("flash_attention attn_implementation flash_attn", refused("transformers chooses; leave it out")),
    **_each("tf32", refused("leave it out")),
    **_each("neftune_noise_alpha noisy_embedding_alpha", only(OFF, "there is no noise; leave it out")),
    **_each("loraplus_lr_ratio", only(OFF, "A and B train at one rate; leave it out")),
    **_each("deepspeed fsdp fsdp_config", only(OFF, "a run is one process on one device; leave it out")),
    **_each("push_to_hub hub_model_id hub_token", only(OFF, "nothing is uploaded; leave it out")),
    **_each("run_name wandb_project wandb_entity wandb_name wandb_run_id",
            only(OFF, "set it in the tracker's environment, such as WANDB_PROJECT, beside track: [wandb]")),
}  # fmt: skip

# Names that are ours too: the values by which one knows that another tool wrote them.
_OUR_NAMES_ELSEWHERE = {
    "dtype": ("float32", "float", "bfloat16", "float16", "half", "torch.float32", "torch.bfloat16", "torch.float16"),
    "optimizer": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_bnb_8bit", "paged_adamw_32bit"),
    "gradient_checkpointing": ("unsloth",),
    "max_steps": ("-1",),
}
_ONLY_AMONG_THEIRS = {"max_steps"}  # elsewhere the value is a mistake
_NO_LIMIT = "of -1 is no limit there, and left out: epochs set the length"
_SWITCHES = frozenset(
    """load_in_4bit load_in_8bit lora_target_linear use_dora peft_use_dora use_rslora peft_use_rslora bf16 fp16
    sample_packing use_liger_kernel use_liger enable_liger_kernel do_train full_finetuning fan_in_fan_out
    inference_mode overwrite_cache trust_remote_code train_on_inputs train_on_prompt completion_only_loss
    assistant_only_loss use_gradient_checkpointing load_best_model_at_end overwrite_output_dir tf32
    push_to_hub""".split()  # noqa: SIM905
)
