"""Tests of what holds over all files: import layers, and who may do what."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "bnbench").rglob("*.py"))
STUDIES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "studies").rglob("*.py"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of the package in this folder."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_import_contracts_are_kept() -> None:
    answer = lint_imports(ROOT)
    assert answer.returncode == 0, answer.stdout


def test_each_import_contract_can_be_broken(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "bnbench", tmp_path / "bnbench", ignore=shutil.ignore_patterns("__pycache__"))
    wrong = {
        "registry.py": "import bnbench.norms",
        "norms/base.py": "import mlflow",
        "data/base.py": "import optuna",
        "norms/batch.py": "import bnbench.norms.group",
    }
    for name, line in wrong.items():
        path = tmp_path / "bnbench" / name
        path.write_text(path.read_text() + f"\n{line}\n")
    answer = lint_imports(tmp_path)
    assert answer.returncode != 0
    assert "KEPT" not in answer.stdout
    assert answer.stdout.count("BROKEN") == 5


def test_a_module_without_a_layer_is_noticed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "bnbench", tmp_path / "bnbench", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bnbench" / "stray.py").write_text("")
    assert "stray" in lint_imports(tmp_path).stdout


def walk(source: str) -> Iterator[ast.AST]:
    """Yield the syntax tree of a file without its docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    return (node for node in ast.walk(tree) if id(node) not in docstrings)


def places_devices(source: str) -> bool:
    """Tell whether a file names the variable that confines a process to its GPUs."""
    return any(
        (isinstance(node, ast.Constant) and "CUDA_VISIBLE_DEVICES" in str(node.value))
        or (isinstance(node, ast.keyword) and node.arg == "CUDA_VISIBLE_DEVICES")
        for node in walk(source)
    )


def loads_code(source: str) -> list[str]:
    """List what could run code from a file: pickles, and torch.load of more than weights."""
    found = []
    for node in walk(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            found += [
                name for name in names if re.match(r"(_?pickle|cloudpickle|dill|joblib|shelve)\b", name)
            ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if options.get("allow_pickle", "False") != "False" or name.endswith("read_pickle"):
                found.append(name)
    return found


LOGIC = (
    ast.FunctionDef
    | ast.AsyncFunctionDef
    | ast.ClassDef
    | ast.For
    | ast.While
    | ast.If
    | ast.With
    | ast.Try
    | ast.Match
    | ast.Delete
    | ast.AugAssign
    | ast.NamedExpr
)


def decides(source: str) -> list[str]:
    """List the statements of a file that are more than a declaration."""
    return [type(node).__name__ for node in walk(source) if isinstance(node, LOGIC)]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "bnbench/placement.py"])
def test_only_placement_confines_processes_to_devices(name: str) -> None:
    assert not places_devices((ROOT / name).read_text())


# The shipped contracts pickle a layer of their own and read it back.
@pytest.mark.parametrize("name", [name for name in SOURCES + STUDIES if "/testing" not in name])
def test_no_file_is_trusted_with_code(name: str) -> None:
    assert loads_code((ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_file_only_declares(name: str) -> None:
    assert decides((ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", SOURCES)
def test_the_first_line_of_a_file_says_what_it_is(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize(
    "source",
    [
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''",
        "run(env=dict(CUDA_VISIBLE_DEVICES='0'))",
        "f'CUDA_VISIBLE_DEVICES={gpus}'",
    ],
)
def test_confining_is_noticed(source: str) -> None:
    assert places_devices(source)
    assert not places_devices('"""CUDA_VISIBLE_DEVICES is set elsewhere."""')


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "def read():\n    import cloudpickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
    ],
)
def test_loading_code_is_noticed(source: str) -> None:
    assert loads_code(source)
    assert not loads_code("import picklefork, json\ntorch.load(path, weights_only=True)\nnumpy.load(path)")


@pytest.mark.parametrize(
    "source",
    ["def f(): pass", "for x in y: pass", "while True: pass", "if x: y = 1", "class A: pass", "x += 1"],
)
def test_logic_in_a_study_is_noticed(source: str) -> None:
    assert decides(source)
    assert not decides(
        "from bnbench import x\nA = {n: x(n) for n in x() if n}\nB: int = 1\nx(lambda row: row.y)"
    )
