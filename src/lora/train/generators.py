"""The random numbers of a run: its own from step to step, whoever draws some in between, and as JSON."""

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class Generators:
    """The states of python's, numpy's and torch's generators, on the CPU and on every CUDA device in use."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> "Generators":
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        theirs = numpy.random.get_state(legacy=False)  # noqa: NPY002 - what other libraries draw from
        return cls(random.getstate(), theirs, torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        """Set them all. Of CUDA devices, those that this machine has."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)  # noqa: NPY002 - as above
        torch.set_rng_state(self.cpu)
        if self.cuda and torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), self.cuda, strict=False):
                torch.cuda.set_rng_state(state, device)

    def to_json(self) -> dict[str, Any]:
        version, words, gauss = self.python
        state = self.numpy["state"]
        return {
            "python": [version, list(words), gauss],
            "numpy": {**self.numpy, "state": {"key": state["key"].tolist(), "pos": int(state["pos"])}},
            "torch": _hex(self.cpu),
            "cuda": [_hex(each) for each in self.cuda],
        }

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Generators":
        """From `to_json`. Raises LookupError, TypeError or ValueError where it is something else."""
        version, words, gauss = found["python"]
        key = numpy.array(found["numpy"]["state"]["key"], dtype=numpy.uint32)
        state = {**found["numpy"], "state": {"key": key, "pos": found["numpy"]["state"]["pos"]}}
        cuda = tuple(map(_tensor, found["cuda"]))
        return cls((version, tuple(words), gauss), state, _tensor(found["torch"]), cuda)


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
