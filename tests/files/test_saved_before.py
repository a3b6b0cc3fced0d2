"""Files that an earlier version wrote are read as they were meant, and written again the same.

saved_before/ was written by the first version that told how a base is quantized, from the nets below.
"""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import same_bits
from lora.files.adapter import read
from lora.files.header import CHECKSUM

SAVED = Path(__file__).parent / "saved_before"


def values(*shape: int) -> Tensor:
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    return (((n * 37 + 11) % 101 - 50) / 64).view(shape)


class Net(nn.Module):
    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.one: nn.Module = nn.Linear(32, 8)
        self.two: nn.Module = nn.Linear(32, 8)
        self.head = nn.Linear(8, 3)
        for parameter in self.parameters():
            parameter.data = values(*parameter.shape)
        if quantized:
            bnb = pytest.importorskip("bitsandbytes").nn
            self.one = bnb.Linear4bit(32, 8, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            self.one.weight = bnb.Params4bit(values(8, 32), False, quant_type="nf4", compress_statistics=True)
            self.two = bnb.Linear8bitLt(32, 8, bias=False, has_fp16_weights=False)
            self.two.weight = bnb.Int8Params(values(8, 32), requires_grad=False, has_fp16_weights=False)
            self.to("cpu")


@pytest.mark.parametrize("kind", ["dense", "quantized"])
def test_an_earlier_file_is_read_and_written_the_same(kind: str, tmp_path: Path) -> None:
    before = read(SAVED / kind)
    assert before.verified is True
    assert before.paired
    net = Net(kind == "quantized")
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora.LoraWarning)  # the base is the one that it was trained on
        lora.load(net, SAVED / kind)
    assert torch.equal(net.one.lora["default"].A, values(2, 32))
    assert net.one.lora["default"].scaling == 2.5 / 2**0.5
    lora.save(net, tmp_path)
    after = read(tmp_path)
    config = "adapter_config.json"
    assert (tmp_path / config).read_text() == (SAVED / kind / config).read_text()
    assert {**after.metadata, CHECKSUM: ""} == {**before.metadata, CHECKSUM: ""}  # of bytes whose order is free
    assert same_bits(after.tensors(), before.tensors())


def test_the_words_for_a_quantization_are_the_files() -> None:
    assert '"quantisation": "double-quantised nf4, int8"' in read(SAVED / "quantized").metadata["lora.base"]
    net = Net(True)
    net.one = nn.Linear(32, 8)
    net.one.weight.data = values(8, 32)
    with pytest.warns(lora.LoraWarning, match="a base in double-quantized nf4, int8, and this one is in int8;"):
        lora.load(net, SAVED / "quantized")
