"""Values that a file may hold to do harm, as JSON text, and JSON that holds them."""

import json
import random
import re
from typing import Any

PATTERNS = [
    "(([a-z_.0-9]+)+)+!", "(.*)*x!", r"(\w|\w\w|[a-z._]+)*!", "(?=(.+)+!)q", "(a?){40}" * 40, "(" * 500 + ")" * 500,
    "((((.{1,900}){1,900}){1,900}){1,900})!", "(?P<a>.)(?P=a)*", "[", "*", "(?i)Q_PROJ", ".*", "",
]  # fmt: skip
STRINGS = [*PATTERNS, "x" * 1_000_000, "\0", "\ud800", "q_proj", "v_proj\n", "none", "../..", "%s{0}"]
# Values as JSON text, because Python's writer refuses some of them.
VALUES = [
    "null", "true", "false", "[]", "{}", "-1", "-0.0", "0", "1", "2.0", "3", "0.5", "1000000000", "1" + "0" * 30,
    "1" + "0" * 400, "1e30", "1e400", "-1e400", "5e-324", "NaN", "Infinity", "-Infinity", "9" * 5000,
    "[" * 1000 + "]" * 1000, "[" * 100_000 + "]" * 100_000, '{"a":' * 1000 + "1" + "}" * 1000, "[null]",
    '["q_proj", null]', '[["q_proj"]]', '{"q_proj": null}', '{"q_proj": 1000000000}', '{"q_proj": -1}',
    '{"q_proj": "4"}', '{"q_proj": 2, "q_proj": 3}',
    *map(json.dumps, STRINGS), *(json.dumps([text]) for text in STRINGS), *(json.dumps({text: 4}) for text in STRINGS),
    *(json.dumps([f"m{n}" for n in range(n)]) for n in (1000, 50_000)), "[1, 0]", "[1000000000]",
]  # fmt: skip
MARK = "\x01"
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "",
    "f32",
    "F" * 5000,
]


def as_text(value: Any) -> str:
    """JSON; a text behind the mark stands in it as it is, wherever it is."""
    found: list[str] = []

    def hold(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(MARK):
            found.append(value[1:])
            return f"{MARK}{len(found) - 1}{MARK}"
        if isinstance(value, dict):
            return {key: hold(each) for key, each in value.items()}
        return [hold(each) for each in value] if isinstance(value, list) else value

    return re.sub(r'"\\u0001(\d+)\\u0001"', lambda match: found[int(match[1])], json.dumps(hold(value)))


def hostile(rng: random.Random) -> str:
    return MARK + rng.choice(VALUES)
