"""README.md beside an adapter: the card that hubs show. It names files and folders, never where they lie."""

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files.commit import replaced
from .finished import Finished, check_folder
from .markdown import block, cell, number, table
from .places import base_name, data_name, without_places

CARD_FILE = "README.md"
MARK = "<!-- lora train wrote this card; without this line the next run leaves it alone -->"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told
_LEFT_OUT = ("model", "data", "eval_data", "out", "track")  # of the settings: they name places, or say nothing of it


def write(folder: Path) -> str | None:
    """Writes the card, or says in a sentence that a README.md which no run has written was left as it is.

    Raises:
        LoraError: no run has ended in `folder`.
    """
    file = folder / CARD_FILE
    if os.path.lexists(file) and not (file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace")):
        return f"{CARD_FILE} in {str(folder)!r} is not of a run, so it was left as it is and no card was written"
    text = card(folder)
    with replaced(file) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return None


def card(folder: Path) -> str:
    """The card as Markdown under a YAML header."""
    check_folder(folder)
    run = Finished.read(folder)
    name = folder.resolve().name
    base, on_hub = base_name(str(run.recipe.get("model", "")))
    parts = [
        _header(run, base if on_hub else None), MARK, f"# {cell(name)}", _about(run, base, on_hub),
        "## Use", *_use(run, name, base), "## Training", table(["", ""], list(_trained(run))),
        *_checks(run), "## Settings", _settings(run),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _header(run: Finished, base: str | None) -> str:
    import yaml

    classifies = run.recipe.get("task") == "classify"
    fields: dict[str, Any] = {"base_model": base} if base else {}
    fields["library_name"] = "lora" if run.prompts else "peft"  # whose files these are
    fields["pipeline_tag"] = "text-classification" if classifies else "text-generation"
    fields["tags"] = ["llama-adapter" if run.prompts else "lora", *([f"base_model:adapter:{base}"] if base else [])]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _about(run: Finished, base: str, on_hub: bool) -> str:
    where = "on the hub" if on_hub else "a local model, which you need as well"
    does = "gives a text one of its labels" if run.recipe.get("task") == "classify" else "answers as its rows do"
    kind = "LLaMA-Adapter" if run.prompts else "LoRA adapter"
    lines = [
        f"A {kind} for {cell(base)} ({where}). It {does}, and was trained "
        f"on {cell(data_name(str(run.recipe.get('data', ''))))}."
    ]
    if run.quantization != "none":
        lines.append(
            f"The base was quantized while it trained ({cell(run.quantization)}); answers on a base that is not "
            "differ a little."
        )
    template = run.record.get("template")
    if template:
        told = {"chat": "by the tokenizer's chat template", "plain": "as plain text", "inst": "as [INST] ... [/INST]"}
        lines.append(f"Prompts were written {told.get(template, cell(template))}; write yours so.")
    if run.record.get("labels"):
        lines.append(f"Its labels: {cell(', '.join(map(str, run.record['labels'])), 1000)}.")
    return " ".join(lines)


def _use(run: Finished, name: str, base: str) -> Iterator[str]:
    classifies = run.recipe.get("task") == "classify"
    kind = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    count = f", num_labels={len(run.record.get('labels') or ())}" if classifies else ""
    dtype = str(run.record.get("dtype") or "auto")
    load = [
        f"from transformers import {kind}", "",
        f'base = {kind}.from_pretrained({json.dumps(base)}{count}, dtype="{dtype}")',
    ]  # fmt: skip
    yield f"Where {cell(name)} stands below, this folder is meant. By lora:"
    if not classifies:
        quantized = run.recipe.get("quantize") or "none"
        flag = [] if quantized == "none" else ["--quantize", str(quantized)]
        command = ["lora", "generate", base, "--adapter", name, *flag, "--prompt", "..."]
        yield block("sh", " ".join(map(shlex.quote, command)))
    yield block("python", "\n".join(["import lora", *load, f"lora.load(base, {json.dumps(name)})"]))
    if run.prompts:
        yield "PEFT has no gate for each head and vLLM no prompts of this kind, and they cannot be merged."
        return
    if run.adapter.get("lora_update"):
        yield "PEFT and vLLM do not know its kind of update; `lora merge` makes a plain model for them."
        return
    yield "By PEFT:"
    yield block(
        "python",
        "\n".join(
            ["from peft import PeftModel", *load, f"model = PeftModel.from_pretrained(base, {json.dumps(name)})"]
        ),
    )
    yield from _served(run, name, base)


def _served(run: Finished, name: str, base: str) -> Iterator[str]:
    """How vLLM serves it, or why it does not."""
    settings = run.adapter
    ranks = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    rank = max([each for each in ranks if isinstance(each, int)], default=1)
    most = next((each for each in _RANKS if each >= rank), None)
    hindrances = {
        "modules that were trained whole": settings.get("modules_to_save"),
        "the magnitudes of DoRA": settings.get("use_dora"),
        "trained biases": settings.get("bias", "none") != "none",
        "ranks or scales that differ by module": settings.get("rank_pattern") or settings.get("alpha_pattern"),
        f"a rank above {_RANKS[-1]}": most is None,
    }
    found = [what for what, there in hindrances.items() if there]
    merged = shlex.join(["lora", "merge", base, name, f"{name}-merged"])
    if found:
        yield f"vLLM does not serve {' and '.join(found)} as an adapter. Merge it first, and serve the plain model:"
        yield block("sh", merged)
        return
    yield "With vLLM:"
    served = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(most)]
    yield block("sh", shlex.join([*served, "--lora-modules", f"{name}=./{name}"]))


def _trained(run: Finished) -> Iterator[list[str]]:
    record, recipe = run.record, run.recipe
    yield ["data", cell(data_name(str(recipe.get("data", ""))))]
    if recipe.get("eval_data"):
        yield ["held out", cell(data_name(str(recipe["eval_data"])))]
    elif recipe.get("eval_share"):
        yield ["held out", f"{recipe['eval_share']:.1%} of the rows"]
    yield ["rows", f"{number(record.get('rows'))} ({cell(record.get('format', '-'))})"]
    yield run.adapter_rows[0]
    yield from run.course()
    versions = record.get("versions")
    if isinstance(versions, dict):
        yield ["versions", cell(", ".join(f"{name} {version}" for name, version in versions.items()))]


def _checks(run: Finished) -> list[str]:
    rows = [[cell(without_places(text, run.recipe, run.folder), 1000) for text in line] for line in run.checks]
    if not rows:
        return []
    return ["## Check", "After training, the adapter was read back from disk:", table(["check", "verdict", ""], rows)]


def _settings(run: Finished) -> str:
    settings = {key: value for key, value in run.recipe.items() if key not in _LEFT_OUT}
    shown = {k: ", ".join(map(str, v)) or "none" if isinstance(v, list) else str(v) for k, v in settings.items()}
    return table(["setting", "value"], [[cell(k), cell(v, 1000)] for k, v in shown.items()])
