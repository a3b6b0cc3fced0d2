"""How the value of another tool's setting is read: each gives our fields, or says why there are none."""

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import LoraError

Fields = dict[str, Any]
Reading = Callable[[str, Any], Fields]  # a setting's name and value into our fields; `LoraError` where it means none

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
OFF = (None, "", *FALSE, "none", "null", "[]", "{}")


def as_(field: str) -> Reading:
    return lambda name, value: {field: value}


def choice(field: str, **meanings: str) -> Reading:
    """One of a few words, in another spelling."""

    def read(name: str, value: Any) -> Fields:
        word = str(value).lower().removeprefix("torch.")
        if word not in meanings and word not in meanings.values():
            raise LoraError(f"{name} is {value!r:.80}; understood: {', '.join(dict.fromkeys(meanings))}")
        return {field: meanings.get(word, word)}

    return read


def truth(name: str, value: Any) -> bool:
    word = str(value).lower()
    if word not in (*TRUE, *FALSE):
        raise LoraError(f"{name} is {value!r:.80}; it must be true or false")
    return word in TRUE


def if_true(field: str, value: Any) -> Reading:
    return lambda name, given: {field: value} if truth(name, given) else {}


def only(allowed: Iterable[Any], advice: str) -> Reading:
    """A setting that we have no choice in: these values say what is so anyway."""
    words = [str(value).lower() for value in allowed]

    def read(name: str, value: Any) -> Fields:
        if str(value).lower() not in words:
            raise LoraError(f"{name} is {value!r:.80}, which there is nothing for here: {advice}")
        return {}

    return read


def refused(advice: str) -> Reading:
    return only([], advice)


def number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LoraError(f"{name} is {value!r:.80}; it must be a number") from error


def share(name: str, value: Any) -> Fields:
    part = number(name, value)
    if part >= 1:
        raise LoraError(f"{name} is {value!r:.80}, a number of rows; give the share of the rows: eval_share: 0.02")
    return {"eval_share": value} if part > 0 else {}


def ratio(name: str, value: Any) -> Fields:
    if not 0 <= number(name, value) < 1:
        raise LoraError(f"{name} is {value!r:.80}; it must be a share of the run, such as 0.03")
    return {"warmup_steps": value}


def steps(field: str) -> Reading:
    def read(name: str, value: Any) -> Fields:
        count = number(name, value)
        if 0 < count < 1:
            raise LoraError(f"{name} is {value!r:.80}, a share of the run; {field} counts steps: give their number")
        return {field: value} if count > 0 else {}  # Trainer's -1 and 0 mean "not set"

    return read


def bits(name: str, value: Any) -> Fields:
    formats = {"4": "nf4", "8": "int8", "16": "none", "none": "none"}
    if str(value).lower() not in formats:
        raise LoraError(f"{name} is {value!r:.80}; there are 4 (NF4), 8 (int8) and 16 (not quantized)")
    return {"quantize": formats[str(value).lower()]}


def targets(name: str, value: Any) -> Fields:
    everything = value in ("all", "all-linear", ["all"], ["all-linear"], ["all_linear"])
    return {"targets": "all-linear" if everything else value}


def dataset(name: str, value: Any) -> Fields:
    """A path or name, or Axolotl's list of one `{path: ..., type: ...}`; the rows themselves tell their format."""
    entries = value if isinstance(value, list) else [value]
    if len(entries) != 1:
        raise LoraError(f"{name} lists {len(entries)} sources; give one, such as a folder that holds their files")
    (entry,) = entries
    if not isinstance(entry, dict):
        return {"data": entry}
    extra = sorted(set(map(str, entry)) - {"path", "type", "ds_type", "split", "data_files"})
    if extra or not ("path" in entry or "data_files" in entry):
        raise LoraError(f"{name}: understood are path, type, ds_type and split; got {', '.join(map(str, entry)):.200}")
    path = entry.get("data_files") or entry["path"]
    if isinstance(path, list):
        return dataset(name, path)
    return {"data": f"{path}:{entry['split']}" if entry.get("split") else path}


def init(name: str, value: Any) -> Fields:
    starts = {"true": "kaiming", "gaussian": "gaussian"}  # what PEFT calls them
    if str(value).lower() not in starts:
        raise LoraError(f"{name} is {value!r:.80}; there are true (init: kaiming) and gaussian (init: gaussian)")
    return {"init": starts[str(value).lower()]}


def checkpointing(name: str, value: Any) -> Fields:
    if value == "unsloth":
        return {"gradient_checkpointing": True, "offload": True}
    return {"gradient_checkpointing": truth(name, value)}


def trackers(name: str, value: Any) -> Fields:
    if value == "all" or value == ["all"]:
        raise LoraError(f"{name} is 'all'; name them: tensorboard, trackio, wandb")
    if str(value).lower() in ("none", "[]", "['none']"):
        return {"track": []}
    return {"track": value if isinstance(value, list) else [part for part in str(value).split(",") if part]}


def method(name: str, value: Any) -> Fields:
    """The kind of adapter; qlora is lora on a quantized base."""
    prompts = {"method": "llama-adapter"}
    known: dict[str, Fields] = {
        "lora": {}, "qlora": {"quantize": "nf4"}, "llama-adapter": prompts, "adaption-prompt": prompts,
    }  # fmt: skip
    word = str(value).lower().replace("_", "-")
    if word not in known:
        raise LoraError(f"{name} is {value!r:.80}; there are lora, qlora and llama-adapter (adaption_prompt)")
    return known[word]
