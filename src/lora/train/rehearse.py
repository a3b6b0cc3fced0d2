"""One training step on the meta device: what it would hold on a card or a CPU, from moment to moment.

The model is built from its config without values, adapted and prepared by the library's own verbs, and runs forward and
backward; `Ledger` counts the storages. A model of many equal layers runs with four of them and with five: what is held
at a moment that is counted from either end grows by the same with each layer more.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import hosts
from ..ops import rehearsal
from .ledger import Ledger, Peak, tensors_of
from .stand_ins import Offload, attention, use_liger

FEW = 5  # layers of the longer of the two runs; a model of one more runs whole


@dataclass(frozen=True)
class Step:
    """rows, tokens: of the batch, each row as long as that; padded: some are not, so that a mask comes with them;
    accumulated: gradients of an earlier batch are there already."""

    rows: int
    tokens: int
    card: bool
    padded: bool = False
    accumulated: bool = False
    offload: bool = False
    liger: bool = False
    labels_per_row: bool = False


def rehearse(model: Any, step: Step, whole: bool = False) -> dict[str, Peak]:
    """The peak of each moment of a step, in bytes beside what is there before it: weights, A, B, optimizer, gradients
    that were there.

    Args:
        model: on the meta device, adapted and prepared; it is used up.
        whole: run every layer, however many.
    """
    if step.offload:
        function = Offload()
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = function
    if step.liger:
        use_liger(model)
    layers = equal_layers(model)
    if whole or layers is None or len(layers[2]) <= FEW + 1:
        return _run(model, step, layers)
    parent, name, every = layers
    found = []
    for count in (FEW - 1, FEW):
        setattr(parent, name, nn.ModuleList(every[:count]))
        found.append(_run(model, step, (parent, name, getattr(parent, name))))
    setattr(parent, name, every)
    fewer, more = found
    return {moment: _further(fewer[moment], more[moment], len(every) - FEW) for moment in fewer}


def _further(fewer: Peak, more: Peak, layers: int) -> Peak:
    """What the two make so many layers on, in each part."""
    names = {**fewer.parts, **more.parts}
    parts = {n: more.parts.get(n, 0) + layers * (more.parts.get(n, 0) - fewer.parts.get(n, 0)) for n in names}
    return Peak(more.total + layers * (more.total - fewer.total), parts)


Layers = tuple[nn.Module, str, nn.ModuleList]


def equal_layers(model: nn.Module) -> Layers | None:
    """The longest list of modules in a model, and where it stands, if all of them are alike; else None."""
    lists = [
        (parent, name, child) for parent in model.modules() for name, child in parent._modules.items()
        if isinstance(child, nn.ModuleList) and len(child) > 1
    ]  # fmt: skip
    longest = max(lists, key=lambda found: len(found[2]), default=None)
    if longest is None or any(_form(layer) != _form(longest[2][0]) for layer in longest[2]):
        return None
    return longest


def _form(layer: nn.Module) -> list[Any]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    kinds = [(name, type(module)) for name, module in layer.named_modules()]
    # What a layer is beside its tensors, such as one with sliding attention.
    told = [layer.__dict__.get(name) for name in ("attention_type", "layer_type", "mlp_type")]
    return [kinds, [(name, t.shape, t.dtype, t.requires_grad) for name, t in tensors], told]


def _run(model: Any, step: Step, layers: Layers | None) -> dict[str, Peak]:
    ledger = Ledger(step.card)
    handles = _watch(model, ledger, layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if step.accumulated else None
    model.train()
    try:
        # The engine keeps what it needs for meta tensors in the calling thread, and so do the modes.
        with rehearsal.rehearsing("cuda" if step.card else "cpu"), _told(ledger), attention(step.card):
            ledger.leave_out([*tensors_of(model), *(p.grad for p in trained)])
            ledger.mark("start")
            with ledger:
                ledger.part = "inputs"
                inputs = _inputs(model, step)
                ledger.part = "logits and loss"
                loss = model(**inputs)["loss"]
                ledger.mark("backward of the loss")
                ledger.part = "backward pass"
                del inputs  # as Trainer has it
                loss.backward()
                del loss
        if not step.accumulated:
            ledger.name("gradients", [p.grad for p in trained if p.grad is not None])
        return ledger.peaks()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None


@contextlib.contextmanager
def _told(ledger: Ledger) -> Iterator[None]:
    rehearsal.named = ledger.name
    try:
        yield
    finally:
        rehearsal.named = None


def _inputs(model: Any, step: Step) -> dict[str, Any]:
    ids = torch.zeros(step.rows, step.tokens, dtype=torch.int64, device="meta")
    labels = ids.new_zeros(step.rows) if step.labels_per_row else torch.zeros_like(ids)
    # A padded batch has a mask of rows x 1 x tokens x tokens, which transformers would make from another.
    square = (step.rows, 1, step.tokens, step.tokens)
    mask = torch.ones(square, dtype=torch.bool, device="meta") if step.padded else None
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _watch(model: Any, ledger: Ledger, layers: Layers | None) -> list[Any]:
    """Hooks by which the ledger knows what runs: its part of a layer while it goes forward, and the moment."""
    handles: list[Any] = []
    inner = {} if layers is None else {id(layer): i for i, layer in enumerate(layers[2])}
    for name, module in model.named_modules():
        part = _part(name)
        if part and not isinstance(module, nn.ModuleList) and ".lora" not in name:
            handles += _part_hooks(module, part, ledger)
    backward = [False]
    for layer in layers[2] if layers is not None else ():
        i, last = inner[id(layer)], len(inner) - 1
        ends = {0: "first layer", 1: "second layer", last: "last layer", last - 1: "last layer but one"}
        where = ends.get(i, "layers between")
        handles.append(layer.register_forward_pre_hook(_forward_mark(ledger, where, backward)))
        handles.append(layer.register_forward_hook(_backward_mark(ledger, where, backward, i == last)))
    return handles


def _forward_mark(ledger: Ledger, where: str, backward: list[bool]) -> Any:
    def before(module: Any, args: Any) -> None:
        if not backward[0]:  # and not a layer that is run again
            ledger.mark(f"forward, {where}")

    return before


def _backward_mark(ledger: Ledger, where: str, backward: list[bool], last: bool) -> Any:
    def reached(_: Any) -> None:
        backward[0] = True
        ledger.mark(f"backward, {where}")

    def after(module: Any, args: Any, output: Any) -> None:
        if backward[0]:
            return
        first = output if isinstance(output, Tensor) else output[0]
        if first.grad_fn is not None:
            first.grad_fn.register_prehook(reached)
        if last:
            ledger.mark("head and loss")

    return after


def _part_hooks(module: nn.Module, part: str, ledger: Ledger) -> list[Any]:
    before: list[str] = []

    def enter(module: Any, args: Any) -> None:
        before.append(ledger.part)
        if ledger.part != "backward pass":
            ledger.part = part

    def leave(module: Any, args: Any, output: Any) -> None:
        ledger.part = before.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _part(name: str) -> str:
    """What a module's activations are called: by its name within its layer, or in the model."""
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdecimal()]
    if numbers:
        within = words[numbers[0] + 1 : numbers[0] + 2]
        if not within:
            return "residual stream"
        word = within[0]
    else:
        word = words[-1]
    for part, signs in PARTS.items():
        if any(sign in word.lower() for sign in signs):
            return part
    return "others" if numbers else ""


PARTS = {
    "norms": ("norm", "ln_"), "attention": ("attn", "attention"), "MLP": ("mlp", "ffn", "feed_forward", "moe", "fc"),
    "embeddings": ("embed", "wte", "wpe", "rotary"), "logits and loss": ("lm_head", "score", "classifier", "output"),
}  # fmt: skip


def adapter_tensors(model: nn.Module) -> list[Tensor]:
    """A, B and what else the adapters hold."""
    return [p for _, _, adapters in hosts(model) for p in adapters.parameters()]
