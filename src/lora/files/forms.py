"""The forms of adapter that a folder may hold, by the `peft_type` of its settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import SETTINGS, AdapterConfig
from ..errors import LoraError
from . import prompts, settings
from .bounded import clip


class Form(NamedTuple):
    """How the settings of one form are read.

    read: (our config, the keys to keep as they are). check: raises LoraError where they are not what they should be.
    digest: of what gives the tensors their meaning, which is under `maths`. mark: what parts a module's full name from
    the rest of a tensor's key.
    """

    read: Callable[[dict[str, Any], str], tuple[AdapterConfig, dict[str, Any]]]
    check: Callable[[dict[str, Any], str], AdapterConfig]
    digest: Callable[[dict[str, Any]], str]
    maths: tuple[str, ...]
    mark: str


FORMS = {
    "LORA": Form(
        settings.from_peft, settings.config_of, settings.config_digest,
        tuple(setting.peft for setting in SETTINGS.values() if setting.maths), ".lora_",
    ),
    "ADAPTION_PROMPT": Form(
        prompts.from_peft, prompts.config_of, prompts.config_digest, tuple(prompts.KEYS.values()), ".adaption_"
    ),
}  # fmt: skip


def form_of(config: dict[str, Any], where: str = "adapter_config.json") -> Form:
    """Raises LoraError where the settings are of none."""
    found = config.get("peft_type")
    if not isinstance(found, str) or found not in FORMS:
        raise LoraError(
            f"{where}: peft_type is {clip(repr(found))}; this library reads {' and '.join(map(repr, FORMS))}"
        )
    return FORMS[found]
