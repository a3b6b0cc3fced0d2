"""The gated attention to prompts, beside its formula written out in float64."""

import pytest
import torch
from torch import Tensor

from lora.ops import add_prompt_attention

SIZES = [  # batch, heads, key heads, queries, prompts, dim, value dim, batch of the keys
    (2, 4, 2, 9, 5, 8, 8, 1), (3, 6, 1, 63, 1, 12, 12, 3), (1, 3, 3, 1, 10, 16, 10, 1), (0, 4, 2, 7, 3, 8, 8, 1),
]  # fmt: skip


def drawn(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, heads, key_heads, queries, prompts, dim, value_dim, rows = size
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, queries, heads, value_dim), (batch, queries, heads, dim), (rows, key_heads, prompts, dim),
        (rows, key_heads, prompts, value_dim), (rows, heads),
    ]  # fmt: skip
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[1] = tensors[1].transpose(1, 2)  # as a model gives it: not contiguous
    tensors[4] = tensors[4].float() if dtype != torch.float64 else tensors[4]
    return [tensor.requires_grad_() if tensor.is_leaf else tensor.detach().requires_grad_() for tensor in tensors]


def formula(
    output: Tensor, query: Tensor, keys: Tensor, values: Tensor, factors: Tensor, scaling: float,
    softcap: float | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    groups = query.shape[1] // keys.shape[1]
    added = []
    for row in range(len(query)):
        own = [t[row if len(t) > 1 else 0].double() for t in (keys, values, factors)]
        k, v = (t.repeat_interleave(groups, 0) for t in own[:2])
        scores = torch.einsum("hqd,hkd->hqk", query[row].double(), k) * scaling
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        if mask is not None:
            scores = scores.masked_fill(~mask[row], -float("inf"))
        added.append(torch.einsum("hqk,hkd->qhd", scores.softmax(-1), v) * own[2][:, None])
    return output.double() + torch.stack(added) if added else output.double()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_forward_and_gradients(size: tuple[int, ...], dtype: torch.dtype, softcap: float | None) -> None:
    tensors = drawn(size, dtype)
    scaling, tolerance = 0.3, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
    found = add_prompt_attention(*tensors, scaling=scaling, softcap=softcap)
    wanted = formula(*tensors, scaling, softcap)
    assert found.dtype == dtype and found.shape == tensors[0].shape
    assert torch.allclose(found.double(), wanted, atol=tolerance[dtype] * 3, rtol=tolerance[dtype])
    if size[0]:
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad((found.double() * weights).sum(), tensors)
        exact = torch.autograd.grad((wanted * weights).sum(), tensors)
        largest = max(each.norm().item() for each in exact)  # with one prompt, that of the queries is zero
        for gradient, its in zip(grads, exact, strict=True):
            assert (gradient.double() - its.double()).norm() <= tolerance[dtype] * (3 * its.norm() + 0.1 * largest)


def test_the_scale_is_that_of_the_head_where_none_is_given() -> None:
    for softcap in (None, 1.5):
        tensors = drawn(SIZES[0], torch.float64)
        assert torch.allclose(add_prompt_attention(*tensors, softcap=softcap), formula(*tensors, 8**-0.5, softcap))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_rows_with_fewer_prompts(softcap: float | None) -> None:
    tensors = drawn((3, 4, 2, 7, 5, 8, 8, 3), torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    found = add_prompt_attention(*tensors, scaling=0.3, softcap=softcap, mask=mask)
    assert torch.allclose(found, formula(*tensors, 0.3, softcap, mask))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_factor_of_zero_changes_no_bit_also_of_a_negative_zero(
    dtype: torch.dtype, sign: int, softcap: float | None
) -> None:
    output, query, keys, values, factors = (t.detach() for t in drawn((3, 6, 1, 63, 1, 12, 12, 3), dtype))
    output[..., ::2] = -0.0
    output[..., 1::3] = 0.0
    values = values.abs() * sign  # of one sign, so that no sum hides that of a product
    for zero in (0.0, -0.0):
        found = add_prompt_attention(output, query, keys, values, factors * 0 + zero, softcap=softcap)
        assert torch.equal(found.view(torch.uint8), output.view(torch.uint8))
