"""The shape of the code, read from the source, and the cost of an import."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora
from lora import bases, layers, updates
from lora.layers.host import LoraLayer
from lora.ops import dequantize

SOURCE = Path(lora.__file__).parent
# What each room, or file of the root, imports of the library, lazily or not: nothing that comes after it here.
ROOMS = {
    "errors": "",
    "tables": "",
    "kernels": "",
    "config": "errors",
    "files": "errors tables config",
    "ops": "errors kernels",
    "bases": "errors kernels ops",
    "updates": "errors ops bases",
    "exact": "errors tables ops bases updates",
    "layers": "errors kernels config ops bases updates exact",
    "targets": "errors config bases layers",
    "resident": "errors config bases layers",
    "atomic": "errors bases exact layers",
    "preparation": "errors ops bases updates layers targets resident atomic",
    "report": "errors tables bases layers resident preparation",
    "merging": "errors bases exact layers resident atomic",
    "activation": "errors config exact layers resident atomic merging",
    "injection": "errors config bases layers targets resident atomic",
    "llama_adapter": "errors config updates layers targets resident atomic injection lora",
    "saving": "errors config files bases layers resident atomic activation",
    "loading": "errors config files bases updates layers targets resident atomic injection saving",
    "integrations": "errors files bases updates layers resident merging activation saving loading lora",
    "data": "errors",
    "train": "errors tables config files ops bases layers targets saving data lora",
    "evaluation": "errors tables data train lora",
    "commands": "errors tables config files exact data train evaluation lora",
    "cli": "errors commands",
}
FILES_IN_ROOT = 15
LINES = {"file": 300, "class": 150, "function": 50}
TOO_LONG: dict[str, str] = {}  # what, and why it stays whole

# Files that name a kind, an update or a format that is not of their room, and what for.
NAMED_ELSEWHERE = {
    "config.py": {"dora": "a setting: the short form of update='dora'", "affine": "what train_bias puts on linears"},
    "files/settings.py": {"dora": "PEFT has a key for it, use_dora"},
    "files/description.py": {"DoRA": "the same key, shown"},
    "files/header.py": {"int8": "a dtype"},
    "train/names.py": {"nf4": "4 bits elsewhere", "int8": "8 bits elsewhere", "dora": "a setting's other names"},
    "train/readings.py": {"nf4": "4 bits elsewhere", "int8": "8 bits elsewhere"},
    "train/recipe.py": {"nf4": "the choices of a setting", "int8": "the choices of a setting", "dora": "two settings"},
    "train/card.py": {"DoRA": "what vLLM does not serve"},
    "commands/answering.py": {"nf4": "the help of a flag", "int8": "the help of a flag"},
}
# The libraries that make quantized weights, and what their classes and attributes are called.
MAKERS = re.compile(r"bitsandbytes|\bbnb\b|linear4bit|linear8bitlt|params4bit|quant_state|conv1d", re.IGNORECASE)
MAKERS_ELSEWHERE = {
    "train/needs.py": "its optimizers",
    "train/recipe.py": "its optimizers, and the help of a setting",
    "train/quiet.py": "its logger",
    "train/estimate.py": "the states of its optimizers",
    "train/health.py": "whether it is there",
    "commands/train.py": "its remarks when it is imported",
}


def files(within: Path = SOURCE) -> list[Path]:
    return sorted(within.rglob("*.py"))


def short(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    return ".".join(["lora", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module(path): path for path in files()}


def nodes(tree: ast.AST, top: bool) -> Iterator[ast.AST]:
    """All nodes; with `top`, those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (top and (for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))):
            yield node
            yield from nodes(node, top)


def imported(path: Path, top: bool = False) -> set[str]:
    """Full names of the modules that a file imports; with `top`, at import time only."""
    package = (module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]).split(".")
    found = set()
    for node in nodes(ast.parse(path.read_text()), top):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{stem}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else stem for name in inner}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


# Who imports whom.


@pytest.mark.parametrize("name", [*ROOMS, *sorted({room(path) for path in files()} - {"__init__", *ROOMS})])
def test_a_room_imports_what_the_table_says_and_nothing_of_what_comes_after_it(name: str) -> None:
    own = [path for path in files() if room(path) == name]
    assert name in ROOMS and own, f"{name}: say in ROOMS where it stands and what it imports"
    ours = {other for path in own for other in imported(path) if other.partition(".")[0] == "lora"}
    asked = {other.split(".")[1] if "." in other else other for other in ours} - {name}
    assert asked == set(ROOMS[name].split())
    before = itertools.takewhile(lambda other: other != name, ROOMS)
    assert asked <= {*before, "lora"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        graph[name] = set()
        for other in imported(path, top=True):
            parts = other.split(".")
            # The packages on the way run as well, but for those that are being imported already.
            way = {".".join(parts[: i + 1]) for i in range(1, len(parts))}
            graph[name] |= {p for p in way if p in MODULES and not f"{name}.".startswith(f"{p}.")}
    assert sum(map(len, graph.values())) > len(graph)
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if graph[name] <= done}:
        done |= ready
    assert done == graph.keys(), {name: graph[name] - done for name in graph.keys() - done}


def test_only_kernels_import_triton() -> None:
    assert {room(path) for path in files() if "triton" in roots(imported(path))} == {"kernels"}


def test_the_core_imports_nothing_heavy_at_import_time() -> None:
    heavy = {"triton", "transformers", "bitsandbytes", "datasets", "peft", "accelerate", "pydantic", "typer", "rich"}
    users = {room(path) for path in files() if roots(imported(path, top=True)) & heavy}
    assert users == {"kernels", "train", "commands"}


def test_files_are_read_without_torch_but_for_the_fingerprint() -> None:
    users = {path.name for path in files(SOURCE / "files") if "torch" in roots(imported(path, top=True))}
    assert users == {"fingerprint.py"}
    code = "import sys, lora.files.adapter, lora.files.description; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Who knows what by name.


def subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("lora."):
            yield each
            yield from subclasses(each)


def names_by_room() -> dict[str, set[str]]:
    kinds = {*subclasses(layers.Kind), *(kind for kind in subclasses(LoraLayer) if "[" not in kind.__name__)}
    all_updates = set(subclasses(updates.Update))
    formats = set(subclasses(bases.FrozenWeight)) - {bases.Quantized}
    layouts = set(subclasses(dequantize.Layout))
    codes = {*bases.loadable(), *bases.into_names()}
    return {
        "layers": {kind.__name__ for kind in kinds},
        # "lora", the name of the plain update, is the library's as well.
        "updates": {kind.__name__ for kind in all_updates} | {kind.name for kind in all_updates} - {"lora"},
        "bases": {kind.__name__ for kind in formats | layouts} | codes,
    }


def words(path: Path) -> set[str]:
    """What the code of a file names: identifiers, and the words of its strings; docstrings and dtypes are none."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("torch", "tl"):
            found.add(node.attr)
        elif isinstance(node, (ast.alias, ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.arg, ast.keyword)):
            found.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found |= set(re.findall(r"\w+", node.value))
    return found


@pytest.mark.parametrize("home", ["layers", "updates", "bases"])
def test_no_kind_update_or_format_is_named_outside_its_room(home: str) -> None:
    names = names_by_room()[home]
    assert names <= {word for path in files(SOURCE / home) for word in words(path)}  # they are found where they stand
    found = {short(path): words(path) & names for path in files() if room(path) not in (home, "kernels")}
    allowed = {where: {name for name in why if name in names} for where, why in NAMED_ELSEWHERE.items()}
    assert {k: v for k, v in found.items() if v} == {k: v for k, v in allowed.items() if v}


def test_a_kernel_has_the_name_of_its_format_and_knows_no_more_of_it() -> None:
    names = set().union(*names_by_room().values())
    found = {path.name: words(path) & names for path in files(SOURCE / "kernels")}
    assert {k: v for k, v in found.items() if v} == {"dequantize.py": {"int8"}}


def test_the_makers_of_quantized_weights_are_named_in_their_room_alone() -> None:
    found = {short(path): {word.lower() for word in MAKERS.findall(path.read_text())} for path in files()}
    inside = set().union(*(words for path, words in found.items() if path.startswith("bases/")))
    assert {"bitsandbytes", "linear4bit", "linear8bitlt", "conv1d", "quant_state"} <= inside
    assert {path for path, words in found.items() if words and not path.startswith("bases/")} == set(MAKERS_ELSEWHERE)


def test_nobody_asks_outside_layers_of_which_kind_a_host_is() -> None:
    kinds = names_by_room()["layers"] | {"Kind", "MatrixKind", "Adapters", "LoraLayer"}
    asked = {}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked.setdefault(room(path), set()).update(set(re.findall(r"\w+", ast.unparse(node.args[1]))) & kinds)
    assert asked.pop("layers")
    assert not set().union(*asked.values()), asked


def test_adapters_are_found_by_type_never_by_key() -> None:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.In) for op in node.ops):
                left = node.left
                assert not (isinstance(left, ast.Constant) and "lora" in str(left.value)), f"{path}:{node.lineno}"


# How much there is.


def test_the_root_has_few_files() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= FILES_IN_ROOT


def test_files_classes_and_functions_are_short() -> None:
    kinds = {ast.ClassDef: "class", ast.FunctionDef: "function"}
    long = set()
    for path in files():
        text = path.read_text()
        if len(text.splitlines()) > LINES["file"]:
            long.add(short(path))
        for node in ast.walk(ast.parse(text)):
            limit = LINES.get(kinds.get(type(node), ""))
            if limit and node.end_lineno - node.lineno + 1 > limit:
                long.add(f"{short(path)}: {node.name}")
    assert long == set(TOO_LONG)


# What an import costs.


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
