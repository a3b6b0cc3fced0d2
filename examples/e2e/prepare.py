"""Makes train.jsonl and test.jsonl from the E2E NLG files of microsoft/LoRA.

    python examples/e2e/prepare.py FOLDER_WITH_VALID_AND_TEST_TXT

The source lines are `meaning||text`, in tokenized English ("a family - friendly pub , near ..."). Changed here:

- the spaces of the tokenization are taken out, and the held-out meanings carry all their references;
- training rows are those whose sentence states what is to be copied: name, neighbour, kind of place and food;
- in them these are exchanged, in the facts and in the sentence alike. The source's development set has twenty names,
  ten neighbours, one kind of place and two foods: an adapter would learn that there are no others, and not to copy.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

TRAIN_ROWS = 4800
# What training rows are given in place of their own: places that the source does not have, and kinds and foods of which
# it has some. No word of the held-out names is among them.
# fmt: off
LAST = [
    "Arms", "Barn", "Bell", "Bistro", "Canteen", "Cellar", "Corner", "Cottage", "Court", "Crown", "Den", "Diner",
    "Dish", "Eatery", "Fork", "Gate", "Grill", "Hall", "Hearth", "House", "Hut", "Inn", "Kettle", "Kitchen", "Larder",
    "Lodge", "Lounge", "Nook", "Oven", "Palace", "Pantry", "Parlour", "Place", "Plate", "Room", "Spoon", "Table",
    "Tavern", "Yard",
]
STARTS = ["b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "r", "s",
          "sh", "st", "t", "tr", "v", "w", "z"]
ENDS = ["", "", "n", "r", "s", "l", "tto", "ck", "ly", "man", "ter", "field"]
KINDS = ["coffee shop", "pub", "restaurant", "bar", "bakery", "diner", "tea room", "wine bar", "bistro"]
CUISINES = [
    "English", "Chinese", "French", "Japanese", "Italian", "Indian", "Mexican", "Thai", "Greek", "Spanish", "Turkish",
    "Korean", "Vietnamese", "Lebanese", "Polish", "German", "Moroccan", "Portuguese", "Brazilian",
]
FOODS = [*CUISINES, "Fast food", "Seafood", "Vegan food"]
# fmt: on
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


def facts(meaning: str) -> dict[str, str]:
    """ "name: Aromi | area: riverside" as {"name": "Aromi", "area": "riverside"}."""
    return dict(fact.split(": ", 1) for fact in meaning.split(" | "))


def word(chance: random.Random, known: list[str]) -> str:
    """The distinguishing word of a place's name: any word of the language, or one that nobody knows."""
    if chance.random() < 0.6:
        return chance.choice(known)
    syllables = [chance.choice(STARTS) + chance.choice("aeiou") for _ in range(chance.randint(1, 3))]
    return "".join(syllables).title() + chance.choice(ENDS)


def place(chance: random.Random, known: list[str]) -> str:
    """The name of a place, in one of the forms that such names have."""
    first, last, other = word(chance, known), chance.choice(LAST), word(chance, known)
    cuisine = chance.choice(CUISINES)
    return chance.choice(
        [
            first, f"The {first}", f"The {last}", f"Café {first}", f"{first} {cuisine} Cuisine", f"{first} {last}",
            f"The {first} {last}", f"{first} {last} Hotel", f"{first} Organic Café", f"{first} at The {other}",
            f"{first} {cuisine} {last}", f"{last} and {chance.choice(LAST)}", f"{first} {other}", f"{first} of {other}",
            f"{chance.choice(['Two', 'Seven', 'Nine'])} {other} {last}", f"The {first} {other}",
        ]
    )  # fmt: skip


def known_words(held_out: Iterable[str]) -> list[str]:
    """Words of the base model's vocabulary, but for those in the names of the held-out places."""
    vocabulary = json.loads((HERE.parent / "tiny-llama-8m" / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    names = " ".join(facts(m).get(field, "") for m in held_out for field in ("name", "near")).lower().split()
    found = {token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{4,9}", token)} - set(names)
    return [word.title() for word in sorted(found)]


def told(meaning: str, text: str) -> bool:
    """Whether a sentence states, once and to the letter, each fact that is to be copied, and no other kind or food."""
    stated = facts(meaning)
    copied = [stated[field] for field in ("name", "near", "Type", "food") if field in stated]
    rest = text
    for value in copied:
        rest = re.sub(re.escape(value), "", rest, count=1, flags=re.IGNORECASE)
    # What is left over speaks of none of them again: "the coffee is good" would not fit a pub.
    words = {"coffee", "cafe", "café", "chinese", "english", "british", "restaurant", "pub", "shop", "tea"}
    return len(rest) == len(text) - sum(map(len, copied)) and not words & set(re.findall(r"\w+", rest.lower()))


def exchanged(meaning: str, text: str, chance: random.Random, known: list[str]) -> tuple[str, str]:
    """The same row of another place: its name, neighbour, kind and food are others, in both."""
    stated = facts(meaning)
    others = {"name": place(chance, known), "near": place(chance, known)}
    others |= {"Type": chance.choice(KINDS), "food": chance.choice(FOODS)}
    given = {field: others.get(field, value) for field, value in stated.items()}
    for field in ("name", "near", "Type", "food"):
        if field in stated:
            # A mark first, so that no new value is taken for an old one.
            text = re.sub(re.escape(stated[field]), f"<{field}>", text, count=1, flags=re.IGNORECASE)
    if others["food"].lower().endswith("food"):
        text = re.sub("<food> food", "<food>", text, flags=re.IGNORECASE)
    for field in ("Type", "food"):
        an = "an" if others[field][0].lower() in "aeiou" else "a"
        text = re.sub(rf"\b([Aa])n? <{field}>", lambda found, an=an: f"{found[1]}{an[1:]} {others[field]}", text)  # noqa: B023
    for field, value in others.items():
        text = text.replace(f"<{field}>", value)
    return " | ".join(f"{field}: {value}" for field, value in given.items()), text[0].upper() + text[1:]


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
    chance = random.Random(0)
    telling = [pair for pair in train if told(*pair)]
    print(f"{len(telling)} of {len(train)} sentences state what is to be copied")
    known = known_words(held_out)
    # Sentences that have most to tell come twice, of two places.
    telling += [(meaning, text) for meaning, text in telling if "near" in facts(meaning)]
    chosen = [exchanged(*pair, chance, known) for pair in chance.sample(telling, TRAIN_ROWS)]
    # Spread over the file, whose order goes by restaurant.
    meanings = list(held_out)[:: len(held_out) // HELD_OUT_MEANINGS][:HELD_OUT_MEANINGS]
    write(HERE / "train.jsonl", [{"prompt": meaning, "completion": text} for meaning, text in chosen])
    write(HERE / "test.jsonl", [{"prompt": meaning, "references": held_out[meaning]} for meaning in meanings])


if __name__ == "__main__":
    main()
