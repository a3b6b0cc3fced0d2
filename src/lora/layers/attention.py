"""The attention of a decoder layer, with learned prompts beside its sequence (LLaMA-Adapter, arXiv:2303.16199)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight, weight_of
from ..config import AdapterConfig, PromptConfig
from ..errors import LoraError
from ..updates import Prompts, encoder
from . import interface
from .host import LoraLayer, adapters_of, base_modules, original_class
from .kept import room
from .kind import Kind, Line, Part, hosts, register
from .matrix import refuse_replica
from .rows import Rows


class PromptedAttention(LoraLayer):
    """An attention while prompts act. Its own forward runs, and sees a config that names our attention function."""

    @property
    def config(self) -> Any:
        return interface.Seen(self.__dict__["config"])

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters: Any = self._modules["lora"]
        refuse_replica(self)
        prompts = adapters.prompted(self, args, kwargs)
        return adapters.original.forward(self, *args, **kwargs, lora_prompts=prompts)


@register
class PromptAdapters(Kind):
    """The prompts of one attention, by adapter. Several that act are attended to apart, and their parts add."""

    layer = PromptedAttention
    by_targets = False
    by_row = True
    terms: tuple[Prompts, ...]

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.way = interface.Way.of(self.original)
        self.row_names: Sequence[str | None] | None = None  # which adapter each row of a batch has; None: all that act
        self.rows: Rows | None = None
        interface.announce()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        interface.announce()

    def prompted(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[interface.Prompted, ...]:
        """What this call attends to beside its sequence."""
        given = self.way.given(args, kwargs)
        hidden: Tensor = given[self.way.names[0]]  # (batch, length, hidden)
        kept = room(host, given.get("past_key_values"), hidden.shape[1])
        found = []
        for name, term in zip(self.active, self.terms, strict=True):
            held = None if kept is None else kept.get(name)
            if held is not None and held[0] is term.stamp and len(held[1]) in (1, len(hidden)):
                made = held[1:]
            else:
                made = interface.keys_and_values(host, self.way, given, term.inputs(hidden))
                if kept is not None:
                    kept[name] = (term.stamp, *made)
            found.append(interface.Prompted(*made, term.factors()))
        return tuple(found) if self.rows is None else self.rows.choose(found, len(hidden))

    def acts(self, host: nn.Module) -> None:
        for term in self.terms:
            term.change()  # what acts on the projections may be another
        self.rows = None
        if self.row_names is not None:
            index = [self.active.index(name) if name in self.active else -1 for name in self.row_names]
            self.rows = Rows(torch.tensor(index, device=_device(host)))

    @classmethod
    def parts(cls, root: nn.Module, targets: dict[str, nn.Module], config: AdapterConfig, loading: bool) -> list[Part]:
        """Prompts for the topmost attentions of the decoder; with fusion "early" what features give for those below."""
        if not isinstance(config, PromptConfig):
            return []
        found = list(attentions(root).items())
        assert config.layers is not None
        if config.layers > len(found):
            raise LoraError(
                f"layers: got {config.layers}; {type(root).__name__} has {len(found)} attentions that can carry "
                "prompts, and the adapter goes to that many of them from the top"
            )
        chosen = found if config.fusion == "early" else found[-config.layers :]
        if config.fusion == "early" and config.layers == len(found):
            raise LoraError(
                f"layers: got {config.layers}, which is all; fusion='early' puts the features into the layers "
                "below those with prompts, so give fewer"
            )
        for name, _ in chosen:
            if whole := [entry for entry in config.train if f".{entry}." in f".{name}."]:
                raise LoraError(
                    f"train: {whole[0]!r} holds the attention {name!r}, whose prompts would never be attended to in a "
                    "copy that trains whole; leave it out"
                )
        bare = len(chosen) - config.layers
        return [Part(host, cls, _fresh(host, config, loading, i == 0, i < bare)) for i, (_, host) in enumerate(chosen)]

    @classmethod
    def tensors(cls, part: Prompts) -> dict[str, Tensor]:
        own = {} if part.prompts is None else {"adaption_prompt": part.prompts}
        encoded = {} if part.features is None else dict(part.features.named_parameters(prefix="adaption_features"))
        return {**own, "adaption_gate": part.gate, **encoded}

    @classmethod
    def loads_as(cls, host: nn.Module, part: Prompts) -> str:
        last = _projections(host)[-1:]
        if part.rule == "head" or not last or last[0]._parameters.get("bias") is None:
            return ""
        return (
            "the attention's output projection has a bias, which PEFT adds a second time with its prompts; here it is "
            "added once, so the outputs differ by it"
        )

    @classmethod
    def weight(cls, host: nn.Module) -> FrozenWeight | None:
        first = _projections(host)[:1]
        return weight_of(first[0]) if first else None

    @classmethod
    def line(cls, part: Prompts) -> Line:
        _, length, hidden = part.shape
        note = "features" if part.prompts is None else "prompts + features" if part.reads else "prompts"
        note += "" if part.rule == "head" else ", one gate a layer"
        return Line((length, hidden), None, sum(p.numel() for p in part.parameters()), note)

    def runs(self, host: nn.Module, plain: torch.dtype | None) -> str:
        return f"{host.__dict__['config']._attn_implementation or 'eager'} + prompts"

    def check_merge(self, name: str, host: nn.Module, into: str | None) -> None:
        raise LoraError(
            f"model: {', '.join(self.active)} has prompts in {name!r}, which every query attends to. They are no "
            "change of a weight, so they cannot be merged; lora.activate the LoRA adapters alone to merge these"
        )


def attentions(root: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a decoder that can carry prompts, by full name, the lowest layer first.

    Raises:
        LoraError: there is none, or what keeps one from it.
    """
    kind = type(root).__name__
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise LoraError(f"model: {kind} is an encoder and a decoder; LLaMA-Adapter goes to decoders alone")
    decoder = root.get_decoder() if callable(getattr(root, "get_decoder", None)) else root  # type: ignore[operator]
    within = {module for _, module in base_modules(decoder)}
    found = {n: m for n, m in base_modules(root) if m in within and interface.goes_through(original_class(m))}
    found = {name: module for name, module in found.items() if not getattr(module, "is_cross_attention", False)}
    if not found:
        raise LoraError(
            f"model: no module of {kind} looks up its attention in transformers' attention interface "
            "(ALL_ATTENTION_FUNCTIONS), through which prompts are added; models of present transformers do"
        )
    for name, module in found.items():
        cls, function = original_class(module), module.__dict__["config"]._attn_implementation
        if why := interface.why_not(cls):
            raise LoraError(f"model: {name!r}, a {cls.__name__}, cannot carry prompts: {why}")
        if function in interface.Way.of(cls).branches:
            raise LoraError(interface.branches(module, function))
        if hasattr(module, "lora") and not isinstance(adapters_of(module), PromptAdapters):
            raise LoraError(f"model: {name!r} has an attribute `lora` that is not ours, or is trained whole")
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            raise LoraError(
                f"model: {name!r} has had its forward replaced on the instance, and prompts would be passed by; inject "
                "before whatever replaces it"
            )
    return found


def set_rows(root: nn.Module, names: Sequence[str | None] | None) -> Sequence[str | None] | None:
    """Which adapter each row of a batch has, in every attention; None: every row all that act. What was before."""
    before = None
    for _, host, adapters in hosts(root):
        if isinstance(adapters, PromptAdapters):
            before = adapters.row_names
            adapters.row_names = names
            adapters.acts(host)
    return before


def feature_readers(root: nn.Module, name: str) -> list[Prompts]:
    """The parts of an adapter that read features, the lowest layer first; the first one holds what encodes them."""
    found = [a[name] for _, _, a in hosts(root) if isinstance(a, PromptAdapters) and name in a]
    return [part for part in found if part.reads]


def _projections(host: nn.Module) -> list[nn.Module]:
    """The linears of an attention, in their order: that of the output is the last."""
    return [module for _, module in base_modules(host) if module is not host and weight_of(module) is not None]


def _device(host: nn.Module) -> torch.device:
    """Where an attention runs, also where accelerate keeps its weights elsewhere."""
    weights = [weight for module in _projections(host) if (weight := weight_of(module)) is not None]
    return weights[0].device if weights else next(host.parameters()).device


def _fresh(host: nn.Module, config: PromptConfig, loading: bool, lowest: bool, bare: bool) -> Prompts:
    """One layer's part. lowest: of the adapter, which holds what encodes features. bare: it has no prompts."""
    own, device = host.__dict__["config"], _device(host)
    if loading and device.type == "meta":
        device = torch.device("cpu")
    reads = bare or (config.features is not None and config.fusion == "late")
    part = Prompts(
        config.prompt_length, own.hidden_size, own.num_attention_heads, config.gate, device, reads=reads, bare=bare
    )
    if config.features is not None and lowest:
        part.features = encoder(config.fusion, config.features, own.hidden_size, config.prompt_length, device)
    if not loading:
        part.reset_()
    return part
