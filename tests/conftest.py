"""Tiny models of three architectures, and what tests do to them."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lora import LoraError
from lora.layers import hosts

torch.set_num_threads(1)  # the models are tiny: a second thread waits more than it works, most of all on a busy machine
# A shell that starts the tests in the background has them ignore these, and what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def tiny_llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def tiny_gpt2(**changes: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64, **changes}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    for name, parameter in model.named_parameters():  # biases start at zero there, which hides mistakes with them
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def tiny_bert(**changes: object) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "num_labels": 3,
        **changes,
    }
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


MODELS: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj"]),
    "bert": (tiny_bert, ["query", "value", "output.dense"]),
}


@pytest.fixture(params=list(MODELS))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(3))


def randomize(model: nn.Module, std: float = 0.1, seed: int = 1) -> nn.Module:
    """Give every trainable parameter fresh values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal keys, dtypes, and bytes: -0.0 is not 0.0."""
    if left.keys() != right.keys():
        return False
    return all(
        left[k].dtype == right[k].dtype
        and torch.equal(
            left[k].contiguous().view(-1).view(torch.uint8), right[k].contiguous().view(-1).view(torch.uint8)
        )
        for k in left
    )


def state_of(model: nn.Module) -> tuple:
    """All that a failed verb must leave alone, but the values of tensors."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.dtype, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, adapters.active, adapters.undo is None) for name, _, adapters in hosts(model)],
    )


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    values, state = snapshot(model), state_of(model)
    yield
    assert state_of(model) == state
    assert same_bits(snapshot(model), values)


def refused(verb: Callable[[], object], model: nn.Module, match: str) -> None:
    """The verb raises LoraError with these words, and the model is the same to the bit."""
    with unchanged(model), pytest.raises(LoraError, match=match):
        verb()
