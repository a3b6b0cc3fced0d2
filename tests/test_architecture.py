"""The shape of the code, read from the source, and the cost of an import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora

SOURCE = Path(lora.__file__).parent
# A part may import the parts before it in this list, and its own.
ORDER = [
    ["errors"],
    ["config", "tables", "kernels"],
    ["files", "ops"],
    ["bases"],
    ["updates"],
    ["layers"],
    ["resident", "targets"],
    ["offload"],
    ["preparation"],
    ["report"],
    ["exact"],
    ["merging"],
    ["activation"],
    ["injection"],
    ["saving"],
    ["llama_adapter"],
    ["train"],
    ["commands"],
    ["cli"],
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}


def modules() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path, top_only: bool = False) -> set[str]:
    """Absolute names of what a file imports, `lora.x` for its own; with top_only, at import time only."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body if top_only else ast.walk(tree))
    package = ["lora", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {stem} if node.module else {f"{stem}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_imports_upward(path: Path) -> None:
    part = part_of(path)
    assert part in RANK, f"say in ORDER where {part} stands"
    for name in imported(path):
        if name.startswith("lora.") and name != "lora.__version__":
            other = name.split(".")[1]
            assert other == part or RANK[other] < RANK[part], f"{part} imports {name}"


def test_only_kernels_import_triton() -> None:
    users = {part_of(p) for p in modules() if any(n.split(".")[0] == "triton" for n in imported(p))}
    assert users <= {"kernels"}


def test_the_core_imports_nothing_heavy_at_import_time() -> None:
    heavy = {"triton", "transformers", "bitsandbytes", "datasets", "peft", "accelerate", "pydantic", "typer", "rich"}
    for path in modules():
        if part_of(path) not in ("train", "commands", "cli", "kernels"):
            assert not {n.split(".")[0] for n in imported(path, top_only=True)} & heavy, path


def test_use_on_dense_linears_loads_no_heavy_package_and_the_import_adds_under_1_5_s_to_torchs() -> None:
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import lora
for name in lora.__all__: getattr(lora, name)
took = time.process_time() - start
model = lora.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), r=2, targets=["0"])
model(torch.ones(1, 4)).sum().backward()
str(lora.summary(model)), lora.merge(model), lora.unmerge(model), lora.remove(model)
heavy = [m for m in ("triton", "transformers", "bitsandbytes", "datasets") if m in set(sys.modules) - before]
assert not heavy, heavy
assert took < 1.5, took
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_import_alone_does_not_import_torch() -> None:
    code = "import sys, lora; dir(lora); lora.LoraError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_verbs_stay_functions_whatever_is_imported_first() -> None:
    code = """
import importlib, pkgutil, types, lora
for m in ("saving", "injection", "merging", "report", "activation"): importlib.import_module("lora." + m)
for n in lora.__all__: assert not isinstance(getattr(lora, n), types.ModuleType), n
names = {m.name for m in pkgutil.iter_modules(lora.__path__)}
assert not names & set(lora.__all__), names & set(lora.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_adapters_are_found_by_type_never_by_key() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.In) for op in node.ops):
                left = node.left
                assert not (isinstance(left, ast.Constant) and "lora" in str(left.value)), f"{path}:{node.lineno}"
