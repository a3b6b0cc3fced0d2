"""The seeded dropout mask: its statistics, and that a mask depends on the seed, the row and the column alone."""

import math

import pytest
import torch

from lora.ops.philox import draw_seed, inverse_keep, keep_mask, threshold

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.0, 0.004, 0.05, 0.3, 0.5])
def test_drops_the_asked_share(p: float) -> None:
    rows, columns = 600, 1024
    share = 1 - float(keep_mask(torch.tensor([2**62 + 12345]), rows, columns, p).double().mean())
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / (rows * columns)) + 1 / 65536


def test_a_byte_decides_but_the_probability_is_finer() -> None:
    p = 12.5 / 256  # between two bytes: half the calls take the one limit, half the other
    share = 1 - float(keep_mask(torch.tensor([77]), 2000, 2048, p).double().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / (2000 * 2048))


def test_rows_and_columns_are_uncorrelated() -> None:
    kept = keep_mask(torch.tensor([5]), 512, 1024, 0.5).double() - 0.5
    for shift in (1, 2, 31, 32, 64, 128, 256):
        assert abs(float((kept * kept.roll(shift, 1)).mean())) < 0.25 * 5 / math.sqrt(512 * 1024)
        assert abs(float((kept * kept.roll(shift, 0)).mean())) < 0.25 * 5 / math.sqrt(512 * 1024)


def test_a_part_of_a_larger_mask() -> None:
    seed = torch.tensor([9])
    large = keep_mask(seed, 40, 600, 0.3)
    assert torch.equal(keep_mask(seed, 17, 341, 0.3), large[:17, :341])
    assert not torch.equal(keep_mask(seed + 1, 40, 600, 0.3), large)
    assert not torch.equal(keep_mask(seed + 2**32, 40, 600, 0.3), large)


def test_scale_keeps_the_mean_of_the_rounded_probability() -> None:
    assert inverse_keep(0.0) == 1.0
    assert inverse_keep(1.0) == 0.0
    assert inverse_keep(0.05) * (1 - threshold(0.05) / 65536) == pytest.approx(1)


def test_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(3)
    first = [draw_seed(CPU), draw_seed(CPU)]
    torch.manual_seed(3)
    assert [int(s) for s in first] == [int(draw_seed(CPU)), int(draw_seed(CPU))]
    assert int(first[0]) != int(first[1])
