"""Adapters that are told apart by one number, saves of them in forked processes, and who reads which one."""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora
from attacked_adapters import CONFIG, TENSORS
from lora.layers import hosts

# Each state has a value of its own in A and B, and a scaling of its own, so that a mix of two is seen.
ALPHAS = {1: 0.5, 2: 8.0, 3: 3.0, 4: 20.0}
RANK, WIDTH = 8, 64


def base() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def adapted(state: int) -> nn.Module:
    return filled(lora.inject(base(), r=RANK, alpha=ALPHAS[state], targets=["0", "1"]), state)


def filled(model: nn.Module, state: int) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(state)
    return model


def told(values: set[float], scalings: set[float]) -> str:
    """ "1" to "4" for a whole adapter of that state, else "torn"."""
    if len(values) == 1 and len(scalings) == 1:
        state = int(values.pop())
        if scalings == {ALPHAS.get(state, 0) / RANK}:
            return str(state)
    return "torn"


def read_by_us(folder: Path, model: nn.Module | None = None) -> str:
    """The state that lora.load finds, "torn", "refused: ..." or "foreign: ..."."""
    model = base() if model is None else model
    try:
        lora.load(model, folder)
    except lora.LoraError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"foreign: {error!r}"
    parts = [
        (adapters["default"], part) for _, _, adapters in hosts(model) for part in adapters["default"].parameters()
    ]
    scalings = {part.scaling for part, _ in parts}
    values = {value for _, parameter in parts for value in parameter.detach().unique().tolist()}
    lora.remove(model)
    return told(values, scalings)


def read_by_peft(folder: Path) -> str:
    """The state that PEFT finds, "torn", or "refused: ..." for an error."""
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(base(), folder)
    except Exception as error:
        return f"refused: {error!r}"
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    values = {v for n, p in model.named_parameters() if "lora_" in n for v in p.detach().unique().tolist()}
    return told(values, {layer.scaling["default"] for layer in layers})


def leftovers(folder: Path) -> list[str]:
    return sorted({path.name for path in folder.iterdir()} - {CONFIG, TENSORS}) if folder.is_dir() else []


def template(place: Path, state: int, by: str = "us") -> Path:
    """A folder with a saved adapter, for copies; by "us", "peft" or "nobody"."""
    folder = place / f"template-{state}-{by}"
    if by == "us":
        lora.save(adapted(state), folder)
    elif by == "peft":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHAS[state], target_modules=["0", "1"])
        filled(peft.get_peft_model(base(), config), state).save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    return folder


def fresh(source: Path, folder: Path) -> Path:
    """Put a copy of `source` at `folder`; nothing where there is no source."""
    shutil.rmtree(folder, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, folder)
    return folder


def forked(work: Callable[[], Any], during: Callable[[int, int], None] | None = None) -> tuple[int, Any]:
    """Do the work in a forked process: (its wait status, what the work returned; None where it did not).

    during: called in the meantime with the process and the pipe, from which it may read one byte that `work` wrote
    by way of `started`.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            os.close(read)
            forked.pipe = write  # type: ignore[attr-defined]
            os.write(write, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    if during is not None:
        during(pid, read)
    text = b""
    while part := os.read(read, 1 << 16):
        text += part
    os.close(read)
    _, status = os.waitpid(pid, 0)
    return status, json.loads(text) if text.strip() and os.WIFEXITED(status) and not os.WEXITSTATUS(status) else None


def started() -> None:
    """Tell the parent of a forked process that the work begins."""
    os.write(forked.pipe, b" ")  # type: ignore[attr-defined]


def outcome(save: Callable[[], Any]) -> str:
    """ "saved", "refused: ..." for a LoraError, "foreign: ..." for any other."""
    try:
        save()
    except lora.LoraError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"foreign: {error!r}"
    return "saved"


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
