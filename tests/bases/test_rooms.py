"""What stands in `bases/` alone: the names of formats and of the libraries that make them."""

import re
from pathlib import Path

import lora

SOURCE = Path(lora.__file__).parent
WORDS = re.compile(r"bitsandbytes|\bbnb\b|linear4bit|linear8bitlt|params4bit|quant_state|conv1d", re.IGNORECASE)
# Where bitsandbytes is not a format of weights.
ALLOWED = {
    "train/needs.py": "its optimizers",
    "train/recipe.py": "its optimizers, and the help of a setting",
    "train/quiet.py": "its logger",
    "commands/train.py": "its remarks when it is imported",
}


def test_no_format_is_named_outside_its_room() -> None:
    named = {
        str(path.relative_to(SOURCE)): sorted(set(found))
        for path in SOURCE.rglob("*.py")
        if path.parent != SOURCE / "bases" and (found := WORDS.findall(path.read_text()))
    }
    assert named.keys() == ALLOWED.keys(), named


def test_the_words_are_found_where_they_stand() -> None:
    """The search above would otherwise prove nothing."""
    found = {word.lower() for path in (SOURCE / "bases").glob("*.py") for word in WORDS.findall(path.read_text())}
    assert {"bitsandbytes", "linear4bit", "linear8bitlt", "conv1d", "quant_state"} <= found


def test_weights_ask_nobody_above_them() -> None:
    imports = re.compile(r"^\s*from (\.+)(\w*)", re.MULTILINE)
    for path in (SOURCE / "bases").glob("*.py"):
        above = {name for dots, name in imports.findall(path.read_text()) if dots == ".."}
        assert above <= {"errors", "ops", "kernels"}, path
    three = re.findall(r"^\s*from \.\.(\w+)", (SOURCE / "ops" / "dequantize.py").read_text(), re.MULTILINE)
    assert set(three) == {"errors"}
