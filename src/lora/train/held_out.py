"""Rows that are kept from training, so that a run can be measured on what it has not seen."""

import json
import random
from collections.abc import Sequence

from ..data.formats import detect
from ..data.rows import Row
from ..errors import DataError


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on and the rows held out, both in their order; about `share` of all, at least one of each.

    Rows with one prompt stay together: a prompt that is trained with another answer is no test of anything. Where all
    rows have one prompt, equal rows stay together instead.

    Raises:
        DataError: the rows are all the same.
    """
    groups = _groups([_prompt(row) for row in rows])
    if len(groups) < 2:
        groups = _groups([json.dumps(row, sort_keys=True, default=str) for row in rows])
    if len(groups) < 2:
        raise DataError(f"eval_share is {share:g}, but no row can be held out: all rows are the same; give eval_data")
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    for group in groups[:-1]:  # the last one stays to be trained on
        held.update(group)
        if len(held) >= share * len(rows):
            break
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def _groups(keys: Sequence[str]) -> list[list[int]]:
    """The places of equal keys, together."""
    found: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return list(found.values())


def _prompt(row: Row) -> str:
    """What stands before the first answer; the whole row where it cannot be read (who encodes it will say why)."""
    try:
        example = detect(row, answers=False).read(row, False)
    except DataError:
        return json.dumps(row, sort_keys=True, default=str)
    roles = [message["role"] for message in example.messages]
    before = example.messages[: roles.index("assistant")] if "assistant" in roles else example.messages
    return json.dumps([example.text, *before], sort_keys=True, default=str)
