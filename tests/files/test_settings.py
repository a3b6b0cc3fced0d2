"""Every setting of LoraConfig through PEFT's file and back."""

import json
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest

from lora import LoraConfig, LoraError
from lora.config import SETTINGS
from lora.files.settings import config_digest, from_peft, to_peft

MODULES = ["", *(f"model.layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj", "norm")), "score"]
OTHER: dict[str, Any] = {
    "r": 3,
    "targets": ["v_proj"],
    "alpha": 5.5,
    "dropout": 0.25,
    "bias": "all",
    "init": "kaiming",
    "rslora": True,
    "exclude": ["layers.0.q_proj"],
    "layers": [1],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"v_proj": 7},
    "train": ["score"],
    "update": "mine",
    "dora": True,
}


def written(**changes: Any) -> dict[str, Any]:
    """adapter_config.json of an adapter on q_proj and v_proj with some settings."""
    config = LoraConfig(**{"targets": ["q_proj", "v_proj"], **changes})
    names = config.targets if isinstance(config.targets, list) else []
    targets = [m for m in MODULES if m.rpartition(".")[2] in names]
    if config.layers is not None:
        targets = [m for m in targets if ".1." in m]
    if config.exclude is not None:
        targets.remove("model.layers.0.q_proj")
    facts: dict[str, Any] = {"fan_in_fan_out": False, "base_name": "org/base", "task_type": None}
    return json.loads(json.dumps(to_peft(config, {}, modules=MODULES, targets=targets, **facts)))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_setting_comes_back_from_the_file(name: str) -> None:
    before = LoraConfig(**{"targets": ["q_proj", "v_proj"], name: OTHER[name]})
    after, extra = from_peft(written(**{name: OTHER[name]}), "here")
    assert after == before
    assert getattr(after, name) == OTHER[name]
    assert extra.pop("base_model_name_or_path") == "org/base"


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_digest_covers_what_gives_the_tensors_their_meaning(name: str) -> None:
    meaning = {"r", "alpha", "rslora", "bias", "rank_pattern", "alpha_pattern", "targets", "train", "update", "dora"}
    changed = config_digest(written(**{name: OTHER[name]})) != config_digest(written())
    assert changed == (name in meaning)


def test_a_file_without_the_later_keys_has_the_digest_that_it_had() -> None:
    old = written()
    assert old["use_dora"] is False and "lora_update" not in old
    del old["use_dora"]
    assert config_digest(old) == config_digest(written())


def test_the_updates_that_peft_knows_have_its_key_alone() -> None:
    assert written(dora=True)["use_dora"] is True
    assert "lora_update" not in written(dora=True)
    assert (written(update="mine")["lora_update"], written(update="mine")["use_dora"]) == ("mine", False)
    with pytest.raises(LoraError, match="here: dora: got True beside update='mine'"):
        from_peft({**written(dora=True), "lora_update": "mine"}, "here")


def test_dora_and_update_say_the_same() -> None:
    for config in (LoraConfig(dora=True), LoraConfig(update="dora"), LoraConfig(update="dora", dora=True)):
        assert (config.update, config.dora) == ("dora", True)
    assert (LoraConfig(update="mine").update, LoraConfig(update="mine").dora) == ("mine", False)
    for settings in ({}, {"update": None}, {"dora": None}, {"dora": False}, {"update": "lora"}):
        assert (LoraConfig(**settings).update, LoraConfig(**settings).dora) == ("lora", False)
    for update in ("", 3):
        with pytest.raises(LoraError, match=f"update: got {update!r}; an update's name"):
            LoraConfig(update=update)
    for settings in (
        {"dora": True, "update": "lora"},
        {"dora": False, "update": "dora"},
        {"dora": True, "update": "x"},
    ):
        with pytest.raises(LoraError, match="dora: got (True|False) beside update="):
            LoraConfig(**settings)
    with pytest.raises(LoraError, match="dora: got True beside update='lora'"):
        replace(LoraConfig(dora=True), update="lora")
    with pytest.raises(LoraError, match="dora: got 1; True or False"):
        LoraConfig(dora=1)


def test_every_field_is_a_setting_with_its_own_key_and_place() -> None:
    assert list(SETTINGS) == [field.name for field in fields(LoraConfig)] == [*OTHER]
    assert len({setting.peft for setting in SETTINGS.values()}) == len(SETTINGS)
    places = [setting.maths for setting in SETTINGS.values() if setting.maths]
    assert sorted(places) == list(range(1, len(places) + 1))
    for field in fields(LoraConfig):
        default = field.default_factory() if field.default is MISSING else field.default
        assert not list(SETTINGS[field.name].check(field.name, default))
        assert list(SETTINGS[field.name].check(field.name, object()))
