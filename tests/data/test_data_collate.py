from lora.data.collate import PaddingCollator
from lora.data.encode import IGNORED, Encoded


def test_the_collator_pads_right_and_masks_the_padding() -> None:
    rows = [Encoded(input_ids=[5, 6, 7], labels=[IGNORED, 6, 7]), Encoded(input_ids=[8], labels=[8])]
    batch = PaddingCollator(9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
