"""A package with a norm of its own is installed, listed, held to the contract, and competes in a study."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny_study import statuses, write_tiny

MODULE = '''
"""A norm that comes in a package of its own."""

import torch
from torch import nn

from bnbench.norms import norm


def mean_abs_norm(x, *, eps=1e-5):
    return x / (x.abs().mean(list(range(1, x.ndim)), keepdim=True) + eps)


@norm("mean_abs", paper="arXiv:0000.00000", reference=mean_abs_norm, batch_dependent=False)
class MeanAbsNorm(nn.Module):
    """Divide each sample by its mean absolute value.

    y = γ x / (mean |x| + eps) for x (N, C, *), the mean over C and all positions, γ a channel.
    """

    def __init__(self, num_features: int, dim: int = 2, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def extra_repr(self):
        return f"eps={self.eps}"

    def forward(self, x):
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean = wide.abs().mean(list(range(1, x.ndim)), keepdim=True)
        return (wide / (mean + self.eps) * self.weight.view(-1, *(1,) * (x.ndim - 2))).to(x.dtype)
'''
INFO = "mean_abs_norm-1.0.dist-info"
WHEEL = {
    "mean_abs_norm.py": MODULE,
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: mean-abs-norm\nVersion: 1.0\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/entry_points.txt": "[bnbench.norms]\nmean_abs = mean_abs_norm\n",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package, from a wheel and without a network."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("plugin")
    wheel = folder / "mean_abs_norm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in WHEEL.items():
            archive.writestr(name, text)
        archive.writestr(f"{INFO}/RECORD", "".join(f"{name},,\n" for name in [*WHEEL, f"{INFO}/RECORD"]))
    target = folder / "site"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", target, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


PROGRAM = """
from bnbench.cli.app import call
from bnbench.testing import check_norm

check_norm("mean_abs", dims=(0, 2))
assert call(["norms"]) == 0
assert call(["norms", "show", "mean_abs"]) == 0
"""


def run_python(site: Path, *arguments: str | Path, **more: str) -> str:
    """What a program prints for which the package is installed."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **more}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_norm_is_listed_and_keeps_the_contract(site: Path) -> None:
    out = run_python(site, "-c", PROGRAM)
    row = next(line.split() for line in out.splitlines() if line.startswith("mean_abs "))
    assert row == ["mean_abs", "the", "sample", "C", "arXiv:0000.00000"]
    assert "y = γ x / (mean |x| + eps)" in out
    assert "eps  float = 1e-05" in out


def test_an_installed_norm_competes_in_a_study(site: Path, tmp_path: Path) -> None:
    changes = {
        'Arm("batch", norm="batch", dropout=0.1)': 'Arm("mine", norm="mean_abs")',
        '"batch"': '"mine"',
        "(0.01, 0.1, 1.0)": "(0.1, 1.0)",
        'Cell("long", steps=60)': "",
    }
    study, runs = write_tiny(tmp_path, **changes), tmp_path / "runs"
    options = ["--preset", "smoke", "--offline", "--gpus", "none", "--workers", "1", "--runs", runs]
    run_python(site, "-m", "bnbench.cli", "run", study, *options, BNBENCH_DATA=str(tmp_path / "data"))
    assert set(statuses(runs)) == {"done"}
    with sqlite3.connect(runs / "bnbench.db") as db:
        trials = [json.loads(trial) for (trial,) in db.execute("SELECT trial FROM rows")]
    assert {trial["norm"] for trial in trials} == {"none", "mean_abs"}
    assert "mine" in (runs / "report" / "verdicts.json").read_text()
