"""A base model on disk, small enough to train in a test: random weights under the example model's real tokenizer."""

from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-llama-8m"


def load_example_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EXAMPLE)


def save_tiny_base(folder: Path, chat: bool = True) -> Path:
    """A Llama of 0.3 M parameters with 128 positions; without `chat`, its tokenizer has no chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_example_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.25,  # large enough for the layers to matter
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_encoder(folder: Path) -> Path:
    """A BERT of 0.3 M parameters without a head, under the same tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer = load_example_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        initializer_range=0.25,  # large enough for the layers to matter
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
