"""The whole path on a GPU: a bf16 model with fused, grouped linears, beside plain torch and float64."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, tiny_llama
from lora.layers import plan

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["few rows", "many rows"], autouse=True)
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything once as the rules have it for a small batch, by cuBLAS, and once by the kernels on two streams."""
    if request.param == "many rows":
        from lora.kernels.tuning import card
        from lora.ops import launch, plan

        monkeypatch.setattr(plan, "SMALL", 0)
        monkeypatch.setattr(launch, "plan", plan.plan.__wrapped__)
        monkeypatch.setattr(launch, "card", lambda device: card(device)._replace(processors=1))


def build(dtype: torch.dtype = torch.bfloat16, **keywords: object) -> nn.Module:
    model = tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=97)
    settings = {"r": 16, "targets": "all-linear", **keywords}
    return randomize(lora.inject(model, **settings), std=0.02).to("cuda").to(dtype)


def masters_fp32(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data = parameter.data.float()
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 97, (4, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(0))


def gradients(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    a, b = (torch.cat([d[n].double().flatten() for n in sorted(d)]) for d in (left, right))
    return ((a - b).norm() / b.norm()).item()


def test_error_is_within_twice_plain_torchs_and_repeats(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = masters_fp32(build())
    assert all(row.runs.startswith("fused, ") for row in lora.summary(model).rows)  # too narrow for some kernels
    exact_logits, exact = gradients(copy.deepcopy(model).double(), tokens)
    logits, ours = gradients(model, tokens)
    _, again = gradients(model, tokens)
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    monkeypatch.setattr(plan, "DEVICES", ())
    plain_logits, plain = gradients(model, tokens)
    assert distance(ours, exact) <= 2 * distance(plain, exact)
    assert distance({"y": logits}, {"y": exact_logits}) <= 2 * distance({"y": plain_logits}, {"y": exact_logits})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [8192, 500, 1])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)], ids=str)
def test_a_fresh_adapter_changes_no_bit(shape: tuple[int, int], rows: int, bias: bool) -> None:
    net = nn.Sequential(nn.Linear(*shape, bias=bias, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(rows, shape[0], device="cuda", dtype=torch.bfloat16)
    want = net(x)
    lora.inject(net, r=16, targets=["0"])
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_gives_the_same_bits(tokens: Tensor, reentrant: bool, dropout: float) -> None:
    model = masters_fp32(build(dropout=dropout)).train()
    model.enable_input_require_grads()
    torch.manual_seed(0)
    _, want = gradients(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(0)
    _, got = gradients(model, tokens)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_compile_fullgraph(tokens: Tensor) -> None:
    model = masters_fp32(build())
    logits, want = gradients(model, tokens)
    got_logits, got = gradients(torch.compile(model, fullgraph=True), tokens)
    assert distance({"y": got_logits}, {"y": logits}) < 0.02
    assert distance(got, {f"_orig_mod.{name}": value for name, value in want.items()}) < 0.05


def test_autocast_over_a_bf16_base(tokens: Tensor) -> None:
    model = masters_fp32(build())
    _, want = gradients(model, tokens)
    with torch.autocast("cuda", torch.bfloat16):
        _, got = gradients(model, tokens)
    assert distance(got, want) < 0.05


def test_two_active_adapters(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    lora.inject(model, r=7, targets=["q_proj", "v_proj", "down_proj"], name="two")
    model = masters_fp32(randomize(model.cpu(), std=0.02).cuda())
    lora.activate(model, ["default", "two"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora." in name)
    exact_logits, exact = gradients(copy.deepcopy(model).double(), tokens)
    logits, ours = gradients(model, tokens)
    monkeypatch.setattr(plan, "DEVICES", ())
    plain_logits, plain = gradients(model, tokens)
    assert any(".two." in name for name in ours)
    assert distance(ours, exact) <= 2 * distance(plain, exact)
    assert distance({"y": logits}, {"y": exact_logits}) <= 2 * distance({"y": plain_logits}, {"y": exact_logits})


def losses_of_a_captured_step(model: nn.Module, tokens: Tensor) -> list[float]:
    """30 replays of a whole training step, AdamW and all, as one CUDA graph."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, capturable=True)

    def step() -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(30):
        graph.replay()
        losses.append(loss.item())
    return losses


def test_a_whole_training_step_is_captured_in_a_cuda_graph(tokens: Tensor) -> None:
    model = masters_fp32(build(dropout=0.1)).train()
    twin = copy.deepcopy(model)
    losses = losses_of_a_captured_step(model, tokens)
    assert losses[-1] < losses[0] - 0.3
    assert len(set(losses)) > 20
    pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
    changed = [n for (n, p), q in pairs if not torch.equal(p, q)]
    assert changed
    assert all(".lora." in n for n in changed)


def test_merge_on_the_gpu_is_undone_to_the_bit() -> None:
    model = masters_fp32(build())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lora.merge(model)
    lora.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    lora.merge(model)
    model.cpu()
    lora.unmerge(model)
    assert all(torch.equal(v.cpu(), before[k].cpu()) for k, v in model.state_dict().items())
