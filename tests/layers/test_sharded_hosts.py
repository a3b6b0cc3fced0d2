"""Hosts that FSDP shards over two processes, before and after they have adapters: each is run once, by both."""

import copy
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

import lora
from conftest import randomize
from lora import LoraError, LoraWarning
from lora.layers import adapters_of, plan

RANKS = 2
CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


class Net(nn.Module):
    """Two linears in a block, a norm that can be trained whole, and a head; `remember`: recompute the block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        self.remember = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x) if self.remember else checkpoint(self.block, x, use_reentrant=False)
        return self.head(self.norm(x + h))


def batches() -> tuple[Tensor, Tensor]:
    """(2, 5, 6) and (2, 5, 3): a batch for each process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(RANKS, 5, 6, generator=generator), torch.randn(RANKS, 5, 3, generator=generator)


def adapted(**settings: Any) -> Net:
    """Two adapters, "b" on the block alone; "a" acts."""
    model = Net()
    lora.inject(model, r=2, targets=["block.0", "block.2"], name="b")
    lora.inject(model, r=2, targets=["block.0", "block.2", "head"], name="a", **settings)
    return randomize(model)


def shard(model: Net) -> Net:
    for part in (model.block[0], model.block[2], model.norm, model.head):  # hosts themselves
        fully_shard(part)
    fully_shard(model)
    return model


def loss(model: nn.Module, rank: int) -> Tensor:
    x, y = batches()
    return (model(x[rank]) - y[rank]).square().mean()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_gradients(model: nn.Module, twin: nn.Module) -> None:
    """Of one step over both batches, on the model by FSDP and on its twin here."""
    model.zero_grad()
    twin.zero_grad()
    loss(model, dist.get_rank()).backward()
    (sum(loss(twin, rank) for rank in range(RANKS)) / RANKS).backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    found = 0
    for name, parameter in twin.named_parameters():
        assert (parameter.grad is None) == (theirs[name] is None), name
        if parameter.grad is not None:
            found += 1
            torch.testing.assert_close(whole(theirs[name]), parameter.grad, rtol=1e-5, atol=1e-6)
    assert found


def same_outputs(model: nn.Module, twin: nn.Module) -> None:
    x, _ = batches()
    torch.testing.assert_close(model(x[dist.get_rank()]), twin(x[dist.get_rank()]), rtol=1e-5, atol=1e-6)


def all_sharded(model: Net) -> bool:
    return all(isinstance(m, FSDPModule) for m in (model, model.block[0], model.block[2], model.norm, model.head))


def falls(model: nn.Module) -> bool:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        step = loss(model, dist.get_rank())
        step.backward()
        optimizer.step()
        mean = step.detach() / RANKS
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses[-1] < 0.9 * losses[0]


def goes_through_everything(model: Net, twin: Net) -> None:
    """Gradients, other adapters, the base and checkpointing are as on the twin, and the hosts stay FSDP's."""
    classes = {name: type(m) for name, m in model.named_modules()}

    def check() -> None:
        assert all_sharded(model)
        same_outputs(model, twin)

    same_gradients(model, twin)
    check()
    for names in ("b", None, ["a", "b"], "a"):
        for each in (model, twin):
            lora.activate(each, names)
        check()
    assert {name: type(m) for name, m in model.named_modules()} == classes
    with lora.disabled(model), lora.disabled(twin):
        check()
    assert {name: type(m) for name, m in model.named_modules()} == classes
    for each in (model, twin):
        each.remember = False
    same_gradients(model, twin)
    check()
    assert falls(model)


@case
def hosts_that_were_sharded_with_their_adapters(folder: Path) -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    goes_through_everything(shard(model), twin)
    lora.remove(model)
    assert all_sharded(model) and adapters_of(model.head) is None
    same_outputs(model, Net())


@case
def hosts_trained_whole_that_were_sharded_with_their_copies(folder: Path) -> None:
    model = adapted(train=["norm"], bias="all")
    twin = copy.deepcopy(model)
    shard(model)
    goes_through_everything(model, twin)
    lora.activate(model, None)
    same_outputs(model, Net())  # the base is what it was
    lora.remove(model)
    assert all_sharded(model)
    same_outputs(model, Net())


@case
def hosts_that_had_been_sharded_before(folder: Path) -> None:
    model, twin = shard(Net()), adapted()
    classes = {name: type(m) for name, m in model.named_modules()}
    same_outputs(model, Net())
    with pytest.warns(LoraWarning, match="FSDP2 has sharded it.*nobody averages"):
        lora.inject(model, r=2, targets=["block.0", "block.2"], name="b")
    lora.inject(model, r=2, targets=["block.0", "block.2", "head"], name="a")
    own = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data.copy_(own[name])
    assert all_sharded(model)
    same_outputs(model, twin)
    for name in ("b", None, "a"):
        lora.activate(model, name)
        lora.activate(twin, name)
        same_outputs(model, twin)
        assert all_sharded(model)
    # A and B are not FSDP's: who injects this late averages their gradients.
    twin.zero_grad()
    loss(model, dist.get_rank()).backward()
    loss(twin, dist.get_rank()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(whole(parameter.grad), own[name].grad, rtol=1e-5, atol=1e-6)
    assert sum(p.grad is not None for p in model.parameters()) == 6
    assert falls(model)
    lora.remove(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    same_outputs(model, Net())


@case
def merge_and_save_are_refused_by_name_and_the_summary_is_not(folder: Path) -> None:
    model = shard(adapted())
    x = batches()[0][dist.get_rank()]
    before, classes = model(x), {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(LoraError, match=r"'block\.0' is sharded over several processes \(FSDP2\)"):
        lora.merge(model)
    with pytest.raises(LoraError, match=r"block\.0\.lora_A\.weight is sharded over several processes"):
        lora.save(model, folder, name="a")
    assert not list(folder.iterdir())
    summary = lora.summary(model)
    assert [row.r for row in summary.rows] == [2] * len(summary.rows) and "sharded" not in str(summary)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert torch.equal(model(x), before)
    assert summary.trainable == sum(p.numel() for p in adapted().parameters() if p.requires_grad)


@case
def an_adapter_that_came_after_the_sharding_is_saved_by_all_processes_together(folder: Path) -> None:
    model = randomize(lora.inject(shard(Net()), r=2, targets=["head"]))
    with pytest.raises(LoraError, match="'head' is sharded over several processes"):
        lora.merge(model)
    lora.save(model, folder)
    same_outputs(model, lora.load(Net(), folder))


def fsdp1(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    twin = copy.deepcopy(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    same_outputs(wrapped, twin)
    (sum(loss(twin, rank) for rank in range(RANKS)) / RANKS).backward()
    loss(wrapped, dist.get_rank()).backward()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (wrapped, twin)]
    for optimizer in optimizers:
        optimizer.step()
    same_outputs(wrapped, twin)
    assert falls(wrapped)
    lora.activate(model, None)
    same_outputs(wrapped, Net())  # nothing was written to the base


@case
def fsdp1_trains_what_a_low_rank_adapter_has(folder: Path) -> None:
    fsdp1({})


@case
def fsdp1_trains_a_module_whole(folder: Path) -> None:
    fsdp1({"train": ["norm"]})


@case
def fsdp1_trains_biases(folder: Path) -> None:
    fsdp1({"bias": "all"})


def inside_fsdp1(model: Net, everywhere: bool) -> nn.Module:
    """Each of two modules in a wrapper of its own; `everywhere`: and the model around them."""
    settings: Any = {"use_orig_params": True, "device_id": torch.device("cpu")}
    model.block[0] = FullyShardedDataParallel(model.block[0], **settings)
    model.head = FullyShardedDataParallel(model.head, **settings)
    return FullyShardedDataParallel(model, **settings) if everywhere else model


def fsdp1_inside(folder: Path, everywhere: bool) -> None:
    twin = adapted(train=["norm"])
    wrapped = inside_fsdp1(adapted(train=["norm"]), everywhere)
    same_outputs(wrapped, twin)
    for verb in (lora.summary, lambda model: lora.save(model, folder / "a", name="a")):
        with pytest.raises(LoraError, match=r"sharded over several processes \(FSDP1\).*summon_full_params"):
            verb(wrapped)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        lora.save(wrapped, folder / "a", name="a")
        assert str(lora.summary(wrapped)) == str(lora.summary(twin))
        with pytest.raises(LoraError, match=r"\(FSDP1\); load the base and the adapter in one process and merge"):
            lora.merge(wrapped)
    same_outputs(wrapped, twin)
    lora.activate(twin, "a")
    same_outputs(lora.load(Net(), folder / "a"), twin)  # plain names, and whole values
    with pytest.raises(LoraError, match="FullyShardedDataParallel would not sync new parameters"):
        lora.inject(wrapped, r=2, targets=["head"], name="late")


@case
def fsdp1_around_modules_inside_and_the_model_has_plain_names(folder: Path) -> None:
    fsdp1_inside(folder, everywhere=True)


@case
def fsdp1_around_modules_inside_alone_has_plain_names(folder: Path) -> None:
    fsdp1_inside(folder, everywhere=False)


class Siblings(nn.Module):
    """Three linears of one input, which the fused path computes together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)


def siblings_each_by_itself(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = randomize(lora.inject(nn.Sequential(Siblings()), r=2, targets=["q_proj", "k_proj", "v_proj"]))
    twin = copy.deepcopy(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(model[0], name, wrap(getattr(model[0], name)))
    model = wrap(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DEVICES", ("cpu",))
        patch.setattr(plan, "DTYPES", (torch.float32,))
        patch.setattr(plan, "HAS_TRITON", True)
        same_outputs(model, twin)
        assert falls(model)
        for each in (model, twin):
            lora.activate(each, None)
        same_outputs(model, twin)


@case
def fsdp2_around_each_of_the_linears_that_share_an_input(folder: Path) -> None:
    siblings_each_by_itself(fully_shard)


@case
def fsdp1_around_each_of_the_linears_that_share_an_input(folder: Path) -> None:
    settings: Any = {"use_orig_params": True, "device_id": torch.device("cpu")}
    siblings_each_by_itself(lambda module: FullyShardedDataParallel(module, **settings))


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", timeout=timedelta(seconds=30), init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    for name, function in CASES.items():
        own = folder / f"{name}.{rank}"
        own.mkdir()
        try:
            function(own)
        except BaseException:
            (folder / f"{name}.{rank}.error").write_text(traceback.format_exc())
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    spawn(_process, (folder,), RANKS)
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_sharded(name: str, outcome: Path) -> None:
    for rank in range(RANKS):
        assert (outcome / f"{name}.{rank}").is_dir()
        error = outcome / f"{name}.{rank}.error"
        assert not error.exists(), error.read_text()
