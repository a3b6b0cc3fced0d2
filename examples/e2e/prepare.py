"""Makes train.jsonl and test.jsonl from the E2E NLG files of microsoft/LoRA.

    python examples/e2e/prepare.py FOLDER_WITH_VALID_AND_TEST_TXT

The source lines are `meaning||text`, in tokenized English ("a family - friendly pub , near ..."). Changed here: the
spaces of the tokenization are taken out, rows are sampled, and the held-out meanings carry all their references.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

TRAIN_ROWS = 3200
HELD_OUT_MEANINGS = 60
HERE = Path(__file__).parent


def detokenize(text: str) -> str:
    """Plain English: "it 's family - friendly , £ 20 ." -> "it's family-friendly, £20."."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([.,;:!?])", r"\1", text)
    text = re.sub(r" (n't|'(?:s|re|ll|ve|t|d|m))\b", r"\1", text)
    text = re.sub(r" - ", "-", text)
    return re.sub(r"£ (?=\d)", "£", text)


def read(path: Path) -> list[tuple[str, str]]:
    """(meaning, text) pairs of one source file."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        meaning, _, text = line.partition("||")
        # "name : Alimentum | area : city centre" -> "name: Alimentum | area: city centre"
        pairs.append((detokenize(meaning), detokenize(text)))
    return pairs


def references(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Each meaning with all its texts, in the file's order."""
    grouped: dict[str, list[str]] = {}
    for meaning, text in pairs:
        grouped.setdefault(meaning, []).append(text)
    return grouped


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with valid.txt and test.txt")
    source: Path = parser.parse_args().source
    train = read(source / "valid.txt")
    held_out = references(read(source / "test.txt"))
    leaked = {meaning for meaning, _ in train} & held_out.keys()
    if leaked:
        raise SystemExit(f"{len(leaked)} held-out meanings are in the training rows, such as {min(leaked)!r}")
    chosen = random.Random(0).sample(train, TRAIN_ROWS)
    # Spread over the file, whose order goes by restaurant.
    meanings = list(held_out)[:: len(held_out) // HELD_OUT_MEANINGS][:HELD_OUT_MEANINGS]
    write(HERE / "train.jsonl", [{"prompt": meaning, "completion": text} for meaning, text in chosen])
    write(HERE / "test.jsonl", [{"prompt": meaning, "references": held_out[meaning]} for meaning in meanings])


if __name__ == "__main__":
    main()
