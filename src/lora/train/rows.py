"""What a run trains on and what it holds out: rows read, parted, encoded and, where asked for, packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.encode import Encoded, EncodedData, encode_rows
from ..data.packs import fill, packed
from ..data.rows import Row, read_rows
from ..data.template import PromptTemplate
from ..errors import LoraError
from .base import load_config, max_positions
from .classify import encode_labelled, label_names, longest_text
from .defaults import LONGEST
from .feed import Item
from .held_out import hold_out
from .recipe import Recipe


@dataclass(frozen=True)
class RunRows:
    """The rows of a run, as it needs them.

    items: what a step takes some of, rows or packs. held_out: rows as they were read; measured: as they are encoded.
    template: how prompts are written; None for a classifier, which has the labels `names`.
    """

    encoded: EncodedData
    items: Sequence[Item]
    held_out: Sequence[Row]
    measured: Sequence[Encoded]
    tokenizer: Any
    template: PromptTemplate | None = None
    names: list[str] = field(default_factory=list)


def run_rows(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> RunRows:
    """Reads and encodes the recipe's rows; what was found is said. Raises `DataError` for rows that do not do."""
    rows, held_out = list(read_rows(recipe.data)), list[Row]()
    argument = "eval_data" if recipe.eval_data is not None else "eval_share"
    if recipe.eval_data is not None:
        held_out = list(read_rows(recipe.eval_data, argument))
    elif recipe.eval_share is not None:
        rows, held_out = hold_out(rows, recipe.eval_share, recipe.seed)
    # Rows without use are tolerated as a share of the whole file, not of the part that they fell into.
    whole = len(rows) + len(held_out) if recipe.eval_data is None else None
    template = None if recipe.task == "classify" else PromptTemplate(tokenizer, recipe.template)
    names = [] if template is not None else label_names([*rows, *held_out], recipe.model)
    most = max_positions(load_config(recipe.model)) if template is not None else longest_text(recipe.model, tokenizer)
    length = max_length(recipe, most)

    def encode(some: Sequence[Row], argument: str) -> EncodedData:
        if template is None:
            found: EncodedData = encode_labelled(some, tokenizer, length, names, argument)
        else:
            found = encode_rows(some, template, length, argument, of=whole)
        say(f"{argument}: {found}")
        return found

    encoded = encode(rows, "data")
    measured = encode(held_out, argument).rows if held_out else []
    items = _packs(encoded.rows, length, say) if recipe.packing else encoded.rows
    return RunRows(encoded, items, held_out, measured, tokenizer, template, names)


def max_length(recipe: Recipe, most: int | None) -> int:
    """The longest row in tokens: the recipe's, or what the model takes. Raises `LoraError` for more than `most`."""
    if recipe.max_length is None:
        return min(most or LONGEST, LONGEST)
    if most is not None and recipe.max_length > most:
        raise LoraError(f"max_length is {recipe.max_length}, but the model takes {most} tokens; give at most {most}")
    return recipe.max_length


def _packs(rows: Sequence[Encoded], capacity: int, say: Callable[[str], None]) -> list[Item]:
    lengths = [len(row["input_ids"]) for row in rows]
    packs = packed(lengths, capacity)
    say(f"packing: {len(packs):,} packs of at most {capacity} tokens, {fill(lengths, packs, capacity):.0%} full")
    return [[rows[row] for row in pack] for pack in packs]
