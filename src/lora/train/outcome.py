"""Did it work? Three questions to what lies on the disk, not to the model that was trained.

1. Read back into a fresh base, does the adapter give the trained model's logits?
2. Does it end its answers?
3. Is its loss lower than the base's, beyond noise? A fresh adapter changes nothing, so the base is the first step.
   On held-out rows, where there are some, it must not be higher beyond noise.

A run that has seen few answers (`ENOUGH`) cannot be expected to have learned to stop, and its loss may not have left
the noise. For such a run these two are told and not judged; it still fails where the adapter changes nothing or makes
the rows worse.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

import lora

from ..data.collate import PaddingCollator
from ..data.encode import Encoded
from ..data.template import PromptTemplate
from ..errors import CheckError, LoraError
from .answers import Question, answers, question, room
from .evaluations import spread
from .losses import held_out_loss
from .probe import TOLERANCE, Probe, apart, logits_of

ENOUGH = 200  # answers that a run has seen, from which on what it learned is judged
_STOP_ROWS, _LOSS_ROWS = 8, 16
_LONGEST = 256  # tokens of an answer that is waited for
_SHARE = 0.5  # of the answers have to end
Verdict = Literal["ok", "failed", "not judged"]


@dataclass(frozen=True)
class Line:
    """One question: what was asked, the verdict, and what was found."""

    name: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}: {self.text}"


@dataclass(frozen=True)
class Outcome:
    """The three answers, and how long they took."""

    lines: tuple[Line, ...]
    seconds: float

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.verdict == "failed"]

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))

    def to_json(self) -> dict[str, Any]:
        return {"lines": [asdict(line) for line in self.lines], "seconds": round(self.seconds, 3)}

    @classmethod
    def recorded(cls, found: Any) -> "Outcome":
        """From what `to_json` gave, as far as it is that: no lines of anything else."""
        lines = found.get("lines") if isinstance(found, dict) else None
        lines = lines if isinstance(lines, list) else []
        names = {each.name for each in fields(Line)}
        kept = [each for each in lines if isinstance(each, dict) and each.keys() == names]
        return cls(tuple(Line(**each) for each in kept), 0.0)

    def judge(self, adapter: Path, before: str = "") -> None:
        """Raises `CheckError` where a line failed; `before` begins its text."""
        if self.failed:
            why = "\n".join(f"  - {line}" for line in self.failed)
            raise CheckError(f"{before}the adapter in {str(adapter)!r} is complete, and did not pass its check:\n{why}")


@dataclass(frozen=True)
class Material:
    """What the questions are asked with.

    rows: what the loss is taken on: rows that were trained. asked: whose answers are generated; held out where there
    are some. called, asked_called: what a line calls them. template: None for a model that gives no answers. loss: of
    a model on a row. seen: answers that the training saw; None: nobody knows, and it counts as enough. held_out: rows
    that were not trained, for the loss as well.
    """

    rows: Sequence[Encoded]
    asked: Sequence[Encoded]
    template: PromptTemplate | None
    seen: int | None
    called: str = "training rows"
    asked_called: str = "held-out rows"
    loss: Callable[[Any, Encoded], float] | None = None
    held_out: Sequence[Encoded] = ()

    @property
    def is_short(self) -> bool:
        return self.seen is not None and self.seen < ENOUGH

    def loss_of(self, model: Any, row: Encoded) -> float:
        if self.loss is not None:
            return self.loss(model, row)
        return held_out_loss(model, [PaddingCollator(0)([row])])


def check(adapter: Path, load: Callable[[], Any], probe: Probe | None, material: Material) -> Outcome:
    """Asks the three questions of the adapter on disk.

    Args:
        load: gives a fresh base where it is to run. A second copy of the base is needed for the time of the check.
        probe: of the trained model; None where there is no record of it.
    """
    begun = time.perf_counter()
    model = load()
    try:
        lora.load(model, adapter)
    except LoraError as error:
        unread = "the adapter could not be read"
        lines = [Line("read back", "failed", str(error)), Line("stops", "not judged", unread)]
        lines.append(Line("loss", "not judged", unread))
        return Outcome(tuple(lines), time.perf_counter() - begun)
    found = (_read_back(model, probe), _stops(model, material), _unharmed(model, material, _moved(model, material)))
    return Outcome(found, time.perf_counter() - begun)


def spend(model: Any) -> None:
    """Gives a model's memory back although others still hold it, for the fresh base; it cannot be used any more."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _read_back(model: Any, probe: Probe | None) -> Line:
    name = "read back"
    if probe is None:
        return Line(name, "not judged", "every tensor fits the base; there is no record of the trained model's logits")
    logits = logits_of(model, probe.ids)
    found = probe.difference(logits)
    if found.exact:
        return Line(name, "ok", "a fresh base with the adapter gives the trained model's logits, to the bit")
    with lora.disabled(model):
        effect = apart(logits_of(model, probe.ids), logits)
    # Where the same kernels run, on the device where the probe was taken, nothing may differ in fp32.
    same = probe.logits is not None and (model.device.type, logits.dtype) == ("cpu", torch.float32)
    bound = 0.0 if same else min(TOLERANCE[logits.dtype], effect / 2)
    text = (
        f"a fresh base with the adapter gives logits {found.most:.1e} of the largest one apart from the trained "
        f"model's; up to {bound:.1e} is allowed ({str(logits.dtype).removeprefix('torch.')})"
    )
    if found.most <= bound:
        return Line(name, "ok", text)
    return Line(name, "failed", f"{text}; is it the base, the dtype and the quantization that it was trained with?")


def _stops(model: Any, material: Material) -> Line:
    name = "stops"
    if material.template is None:
        return Line(name, "not judged", "a classifier gives labels, which have no end")
    asked = [q for q in map(question, material.asked) if not q.is_text]
    if not asked:
        return Line(name, "not judged", "plain texts have no answer that could end")
    asked = spread([q for q in asked if _bound(q) <= min(_LONGEST, room(q, model) or _LONGEST)], _STOP_ROWS)
    if not asked:
        return Line(
            name, "not judged", f"the answers of the {material.asked_called} are too long to wait for their end"
        )
    given = answers(model, material.template, asked, max(map(_bound, asked)), _STOP_ROWS)
    ended = sum(a.stopped and len(a.ids) < _bound(q) for q, a in zip(asked, given, strict=True))
    text = f"{ended} of {len(asked)} answers to {material.asked_called} end within twice their reference's length"
    if ended >= _SHARE * len(asked):
        return Line(name, "ok", text)
    if material.is_short:
        return Line(name, "not judged", f"{text}; {_few(material)}")
    return Line(
        name, "failed", f"{text}, and half of them have to; train longer or at another lr, and see with `lora data "
        "preview` that the stop token is trained"
    )  # fmt: skip


def _bound(asked: Question) -> int:
    """How many tokens an answer may take until its end, the stop token among them."""
    return 2 * len(asked.reference)


def _moved(model: Any, material: Material) -> Line:
    name = "loss"
    rows = spread(material.rows, _LOSS_ROWS)
    now, before = _losses(model, material, rows)
    text = (
        f"{statistics.fmean(now):.4f} with the adapter, {statistics.fmean(before):.4f} for the base, on {len(rows)} "
        f"{material.called}"
    )
    gains = [was - is_now for was, is_now in zip(before, now, strict=True)]
    if not all(map(math.isfinite, gains)):
        return Line(name, "failed", f"{text}; it is no number")
    if not any(gains):
        return Line(name, "failed", f"{text}: the adapter changes nothing; is lr 0, or does no loss reach its targets?")
    gain, noise = statistics.fmean(gains), _noise(gains)
    if gain > noise:
        return Line(name, "ok", text)
    if gain < -noise:
        return Line(name, "failed", f"{text}: the adapter makes them worse; lower lr")
    text += f"; the difference is within its noise ({noise:.1e})"
    if material.is_short:
        return Line(name, "not judged", f"{text}; {_few(material)}")
    return Line(name, "failed", f"{text}; train longer, or at a higher lr")


def _unharmed(model: Any, material: Material, trained: Line) -> Line:
    """What was found on the trained rows, and whether the adapter makes held-out ones worse. One row has no noise to
    judge by, so it is told."""
    rows = spread(material.held_out, _LOSS_ROWS)
    if not rows:
        return trained
    now, before = _losses(model, material, rows)
    text = (
        f"{trained.text}; {statistics.fmean(now):.4f} and {statistics.fmean(before):.4f} on {len(rows)} held-out rows"
    )
    gains = [was - is_now for was, is_now in zip(before, now, strict=True)]
    if not all(map(math.isfinite, gains)):
        return Line(trained.name, "failed", f"{text}, which is no number")
    if len(gains) > 1 and statistics.fmean(gains) < -_noise(gains):
        why = "the adapter makes them worse; lower lr, or train shorter (early_stop keeps the best step)"
        return Line(trained.name, "failed", f"{text}: {why}")
    return Line(trained.name, trained.verdict, text)


def _losses(model: Any, material: Material, rows: Sequence[Encoded]) -> tuple[list[float], list[float]]:
    """(with the adapter, without it) of each row."""
    now = [material.loss_of(model, row) for row in rows]
    with lora.disabled(model):
        return now, [material.loss_of(model, row) for row in rows]


def _noise(gains: Sequence[float]) -> float:
    """Two standard errors of the mean."""
    return 2 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0


def _few(material: Material) -> str:
    return f"the run saw {material.seen:,} answers, and from {ENOUGH} on this is judged"
