"""Tests of what is not imported before it is needed: a package costs 0.1 to 5 s of every command."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: What takes long to import and is no part of `import torch`.
HEAVY = (
    *("jinja2", "jsonargparse", "lightning", "matplotlib", "mlflow", "optuna", "pandas", "pyarrow", "ray"),
    *("rich", "scipy", "sklearn", "sqlalchemy", "statsmodels", "torchmetrics"),
)


def imported_by(code: str, *names: str) -> list[str]:
    """Run code in a fresh process and list which of these modules it has imported."""
    after = f"import sys; print('imported', *[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{after}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import bnbench", "torch", *HEAVY) == []


def test_norms_need_torch_alone() -> None:
    assert imported_by("import bnbench; bnbench.build_norm('batch', 8)", "torch", *HEAVY) == ["torch"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list"], ["show", "convergence"]])
def test_verbs_that_only_tell_need_no_torch(arguments: list[str]) -> None:
    code = f"from bnbench.cli.app import call; assert call({arguments}) == 0"
    assert imported_by(code, "torch", *HEAVY) == []


def test_an_import_is_noticed() -> None:
    assert imported_by("import bnbench, csv", "torch", "bnbench", "csv") == ["bnbench", "csv"]
