"""`lora inspect --norms` and `--json`: beside the dense product, and for files that hold what they should not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lora
from lora.commands import app
from lora.files import norms as norms_module
from lora.files.adapter import read
from lora.files.norms import norms


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)


def adapted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "out": nn.Linear(24, 9)})
    lora.inject(model, **{"r": 3, "targets": ["up", "down", "out"], "alpha": 5, **settings})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "layers.1.down" not in name:  # whose B stays zero
            nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    lora.save(adapted(), folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "alpha_pattern": {"up": 2}, "rank_pattern": {"down": 5}}])
@pytest.mark.parametrize("block", [1 << 20, 7])
def test_the_norm_is_that_of_the_dense_product(
    settings: dict[str, Any], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms_module, "BLOCK", block)
    model = adapted(**settings)
    lora.save(model, tmp_path)
    found = {each.module: each.norm for each in norms(read(tmp_path))}
    exact = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora") and isinstance(module, nn.Linear):
            [(A, B, s)] = module.lora["default"].pairs()
            exact[name] = (s * B.double() @ A.double()).norm().item()
    assert found.keys() == exact.keys() and len(found) == 5
    assert all(found[name] == pytest.approx(exact[name], rel=1e-9) for name in exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_of_sixteen_bits_is_read_as_it_is(dtype: torch.dtype, saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {key: value.to(dtype) for key, value in load_file(saved / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    found = {each.module: each.norm for each in norms(read(tmp_path))}
    A, B = (tensors[f"base_model.model.layers.0.up.lora_{half}.weight"].double() for half in "AB")
    assert found["layers.0.up"] == pytest.approx((5 / 3 * B @ A).norm().item(), rel=1e-9)


def test_the_table_names_the_largest_and_those_that_are_zero(saved: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(saved), "--norms"])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    start = lines.index("norms of s B A, by layer")
    assert lines[start + 1].split() == ["layer", "down", "up", "out"]
    assert [line.split()[0] for line in lines[start + 3 : start + 6]] == ["0", "1", "-"]
    largest = max(norms(read(saved)), key=lambda each: each.norm)
    assert f"largest: {largest.module}, {largest.norm:.4g}" in lines
    assert "zero, so that they change nothing: layers.1.down" in lines


def test_json_has_all_that_inspect_says(saved: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["inspect", str(saved), "--json", "--norms"]).output)
    assert found["checksum"] == "verified" and not found["damaged"] and found["incomplete"] == []
    assert found["settings"]["r"] == 3 and found["bytes"] == (saved / "adapter_model.safetensors").stat().st_size
    assert found["parameters"] == sum(target["parameters"] for target in found["targets"])
    [up] = [target for target in found["targets"] if target["name"] == "layers.*.up"]
    assert (up["modules"], up["A"]["shape"], up["B"]["shape"]) == (2, [3, 24], [40, 3])
    assert len(found["norms"]) == 5
    assert "norms" not in json.loads(CliRunner().invoke(app, ["inspect", str(saved), "--json"]).output)


def test_nan_adapter_is_named_and_is_no_number_in_json(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model["out"].lora["default"].A[0, 0] = torch.nan
    lora.save(model, tmp_path, check=False)
    assert "NOT FINITE: out" in CliRunner().invoke(app, ["inspect", str(tmp_path), "--norms"]).output
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path), "--norms", "--json"]).output)
    assert {each["module"]: each["norm"] for each in found["norms"]}["out"] is None


def test_no_torch_is_needed(saved: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from lora.files.adapter import read; from lora.files.norms import norms\n"
        "print(len(norms(read(Path(sys.argv[1])))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.stdout.strip() == "5", done.stderr
