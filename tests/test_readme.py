"""What the README says can be done: its first example and its formula run, and its files are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.filterwarnings(
    "ignore:.*:UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
def test_the_example_of_reuse_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(import lightning.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BNBENCH_DATA", str(tmp_path / "data"))
    found: dict[str, object] = {}
    exec(compile(example.replace("max_epochs=5", "max_epochs=1"), str(README), "exec"), found)
    assert type(found["layer"]).__name__ == "GroupNorm"


def test_the_formula_of_the_normalizer_is_torchs() -> None:
    (example,) = re.findall(r"```python\n([^`]*@norm.*?)```", README.read_text(), re.DOTALL)
    formula, _, _ = example.partition("@norm")
    found: dict[str, Any] = {}
    exec(compile(formula, str(README), "exec"), found)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(found["rms_norm"](x), torch.nn.functional.rms_norm(x, (6,), eps=1e-6))
    compile(example, str(README), "exec")


def test_every_file_that_it_links_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) >= 4
    assert not [link for link in links if not (README.parent / link).exists()]
