import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.data.collate import PackingCollator, PaddingCollator, real_tokens
from lora.data.encode import IGNORED, Encoded


def row(*ids: int, prompt: int = 0) -> Encoded:
    return Encoded(input_ids=list(ids), labels=[IGNORED] * prompt + list(ids[prompt:]))


def test_the_collator_pads_right_and_masks_the_padding() -> None:
    batch = PaddingCollator(9)([row(5, 6, 7, prompt=1), row(8)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]]
    assert real_tokens(batch) == 4


PACKS = [[row(5, 6, 7, prompt=1), row(3, 4)], [row(8, 2)]]


def test_packs_are_rows_whose_positions_start_again_and_whose_first_tokens_are_not_trained() -> None:
    batch = PackingCollator(9)(PACKS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3, 4], [8, 2, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 4], [IGNORED, 2, IGNORED, IGNORED, IGNORED]]
    assert batch["use_cache"] is False and set(batch) == {"input_ids", "position_ids", "labels", "use_cache"}


def test_flat_packs_are_what_transformers_flattens() -> None:
    from transformers import DataCollatorWithFlattening

    rows = [row for pack in PACKS for row in pack]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows, return_tensors="pt")
    ours = PackingCollator(9, flat=True)(PACKS)
    assert ours.pop("use_cache") is False
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype, name
        else:
            assert value == theirs[name]


@given(st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_the_tokens_of_packs_are_counted_without_their_padding(lengths: list[list[int]], flat: bool) -> None:
    batch = PackingCollator(0, flat)([[row(*range(1, length + 1)) for length in pack] for pack in lengths])
    assert real_tokens(batch) == sum(map(sum, lengths))
