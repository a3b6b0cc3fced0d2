import torch

from lora.data.collate import PackingCollator, PaddingCollator
from lora.data.encode import IGNORED, Encoded


def row(*ids: int, prompt: int = 0) -> Encoded:
    return Encoded(input_ids=list(ids), labels=[IGNORED] * prompt + list(ids[prompt:]))


def test_the_collator_pads_right_and_masks_the_padding() -> None:
    batch = PaddingCollator(9)([row(5, 6, 7, prompt=1), row(8)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]]


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
