"""What a recipe means, every setting resolved, without torch and without the base's weights."""

from pathlib import Path
from typing import Any

from ..data.rows import Glance, glance
from ..errors import LoraError
from ..tables import table
from .base_facts import BaseFacts, read_facts
from .checks import check_held_out, check_out
from .defaults import Resolved, amount, held_out, resolved, total_steps
from .methods import foreign, parameters, words
from .recipe import Recipe

_INST = "[INST] prompt [/INST] answer"


def dry_run(recipe: Recipe, force: bool = False) -> tuple[str, LoraError | None]:
    """The recipe in full as text, and the first thing that would stop the run.

    What cannot be reached is left open and said; everything else is told all the same.
    """
    errors: list[LoraError] = []
    facts, found, rows = None, None, None
    try:
        check_held_out(recipe)
    except LoraError as error:
        errors.append(error)
    try:
        facts = read_facts(recipe.model)
    except LoraError as error:
        errors.append(error)
    try:
        check_out(recipe, force, facts)
    except LoraError as error:
        errors.append(error)
    try:
        found = glance(recipe.data, task=recipe.task)
        rows = None if found.rows is None else found.rows - held_out(recipe, found.rows)
        if recipe.eval_data is not None:
            glance(recipe.eval_data, "eval_data", recipe.task)
    except LoraError as error:
        errors.append(error)
    try:
        plan = resolved(recipe, facts, rows)
    except LoraError as error:
        errors.append(error)
        plan = Resolved(recipe, ())
    return _told(plan, recipe, facts, found, rows), errors[0] if errors else None


def _told(plan: Resolved, recipe: Recipe, facts: BaseFacts | None, found: Glance | None, rows: int | None) -> str:
    reasons = {choice.field: choice.reason for choice in plan.choices}
    lines = []
    for name in (name for name in Recipe.model_fields if name not in foreign(recipe.method)):
        value = getattr(plan.recipe, name)
        if name == "template" and value == "inst":
            reasons[name] = _INST
        if name == "samples" and value == 0 and name not in recipe.model_fields_set:
            reasons[name] = "no rows are held out"
        why = reasons.get(name, "given" if name in recipe.model_fields_set else "default")
        if value is not None or name in recipe.model_fields_set:
            lines.append([name, _shown(value), why])
        elif name in ("lr", "warmup_steps", "save_every", "max_length"):
            lines.append([name, "open", "decided when the base and the number of rows are known"])
    return "\n".join([table(["setting", "value", "why"], lines), "", *_facts(plan.recipe, facts, found, rows)])


def _facts(recipe: Recipe, facts: BaseFacts | None, found: Glance | None, rows: int | None) -> list[str]:
    """What is there, and what follows from it."""
    if facts is None:
        base = "cannot be reached from here, so what depends on its size is open"
    else:
        size = "unknown size" if facts.parameters is None else f"{amount(facts.parameters)} parameters"
        base = f"{facts.kind}, {size}" + (f", stored quantized ({facts.stored})" if facts.stored else "")
    if found is None:
        data = "cannot be read (see below)"
    elif found.rows is None:
        data = f"a set on the hub; its format is {found.format}"
    else:
        held = held_out(recipe, found.rows)
        data = f"{found.format}, {found.rows:,} rows" + (f", about {held:,} of them held out" if held else "")
    config = recipe.adapter()
    trained = parameters(config, facts)
    lines = [f"base: {base}", f"data: {data}", f"adapter: {words(config)}"]
    if trained is not None:
        lines[-1] += f", {trained:,} parameters"
    if recipe.max_steps is not None or rows is not None:
        steps = recipe.max_steps if rows is None else total_steps(recipe, rows)
        lines.append(f"steps: {steps:,} of {recipe.batch_size} x {recipe.grad_accum} rows")
    if recipe.template == "auto" and Path(recipe.model).is_dir():
        lines.append(
            f"template: {'chat' if _has_chat_template(Path(recipe.model)) else 'plain'}, as the tokenizer has it"
        )
    return lines


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={each:g}" for key, each in value.items()) or "none"
    return str(value)
