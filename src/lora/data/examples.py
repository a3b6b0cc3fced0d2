"""All rows of a source read in one format, with what could not be read counted; past a small share it is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import DataError, LoraError
from .formats import Example, detect
from .sound import Row, named_rows, place

# The share of rows that may be unusable before a run is refused. A large set has some broken rows, which must not
# cost a night; more than one in a hundred is no accident but a fault of the whole set or of its template.
SHARE = 0.01


@dataclass
class Examples:
    """What was read: each example with the place of its row, and what was left out.

    `faults` holds the places of the rows that cannot be trained on, by what is wrong with them; `marked` counts rows
    that say themselves that they are not to be trained; `unused` counts the rows that have a field without a use.
    """

    format: str
    read: int
    examples: list[tuple[str, Example]] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    marked: int = 0
    unused: dict[str, int] = field(default_factory=dict)


def read_examples(rows: Sequence[Row], argument: str = "data", of: int | None = None) -> Examples:
    """Reads rows of one format, the first row's. `of` counts the rows of the whole, where these are a part of it.

    Raises:
        DataError: the first row fits no format, more than `SHARE` of the rows cannot be read, or none is to be trained.
    """
    try:
        known = detect(rows[0])
    except LoraError as error:
        raise DataError(f"{argument}: row {place(rows[0], 1)}: {error}") from error
    found = Examples(known.name, len(rows))
    for number, row in enumerate(rows, 1):
        try:
            missing = [name for name in known.fields if name not in row]
            if missing:
                raise DataError(f"lacks {', '.join(missing)}; the first row's format is {known.name}")
            example = known.read(row, True)
        except DataError as error:
            found.faults.setdefault(str(error), []).append(place(row, number))
            continue
        for name in example.unused:
            found.unused[name] = found.unused.get(name, 0) + 1
        if example.left_out:
            found.marked += 1
        else:
            found.examples.append((place(row, number), example))
    check_share(found.faults, of or len(rows), argument)
    if not found.examples:
        raise DataError(f"{argument}: every row is marked not to be trained (weight 0, train: false)")
    return found


def check_share(faults: Mapping[str, Sequence[str]], rows: int, argument: str) -> None:
    """Raises `DataError` that names the rows when more than `SHARE` of all rows cannot be trained on."""
    count = sum(map(len, faults.values()))
    if count > SHARE * rows:
        raise DataError(
            f"{argument}: {count:,} of {rows:,} row(s) cannot be trained on, more than the {SHARE:.0%} that are left "
            f"out with a note; correct or remove them\n{described(faults)}"
        )


def described(faults: Mapping[str, Sequence[str]]) -> str:
    """A line for each of the first faults, with its rows."""
    lines = [f"  - {named_rows(places)}: {fault}" for fault, places in list(faults.items())[:5]]
    if len(faults) > 5:
        lines.append(f"  - and {len(faults) - 5} other faults")
    return "\n".join(lines)
