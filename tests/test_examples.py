"""What the examples and the page on probes show: they run as they stand, and no probe is missing."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bnbench.data import load_split
from bnbench.lit import NormClassifier
from bnbench.probes import PROBES, build_probe
from tests.test_engine_chunked import QUIET

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "probes.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_two_probes_read_a_module_that_is_not_ours(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "probes_on_your_module.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    numbers = {
        words[0]: [float(word) for word in words[1:]]
        for line in done.stdout.splitlines()
        if len(words := line.split()) >= 4 and "after" not in words and "by" not in words
    }
    # Batch normalization over ReLU explodes backwards from the first step on.
    assert len(numbers["factor"]) == 4 and min(numbers["factor"]) > 1
    assert [math.log(factor) for factor in numbers["factor"]] == pytest.approx(
        numbers["log_factor"], abs=0.002
    )
    layers = [name for name in numbers if name.startswith("model.")]
    assert layers == [f"model.{place}" for place in range(0, 18, 3)]
    assert len(numbers["variance_l2"]) == 3 and min(numbers["variance_l2"]) > 0


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_each_piece_of_code_on_the_page_runs(
    snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BNBENCH_DATA", str(tmp_path / "data"))
    found: dict[str, object] = {}
    exec(
        compile(snippet.replace("L.Trainer(", "L.Trainer(accelerator='cpu', logger=False, "), "page", "exec"),
        found,
    )
    if "flow" in found:
        assert found["flow"].trace.steps == (0, 10, 20, 30)  # type: ignore[attr-defined]
    if "reading" in found:
        assert 0.5 < found["reading"].values["cosine"] < 1  # type: ignore[attr-defined]


def rows_of_the_page() -> dict[str, list[str]]:
    """The cells of each probe's row by its name."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row for row in rows}


def test_the_page_names_every_probe_with_what_it_reads(tmp_path: Path) -> None:
    import lightning as L

    split = load_split("digits", 0, folder=tmp_path)
    train = DataLoader(TensorDataset(split.train.x, split.train.y), batch_size=16)
    held_out = DataLoader(TensorDataset(split.val.x[:16], split.val.y[:16]), batch_size=16)
    probes = [build_probe(name, steps=[0]) for name in PROBES]
    module = NormClassifier("mlp", in_shape=(1, 8, 8), num_classes=10, model_options={"depth": 3, "width": 8})
    torch.manual_seed(0)
    trainer = L.Trainer(**{**QUIET, "max_steps": 1}, callbacks=probes)
    trainer.fit(module, train, held_out)
    rows = rows_of_the_page()
    assert sorted(rows) == sorted(PROBES)
    for probe in probes:
        _, callback, _, values, axis = rows[probe.name]
        named = re.findall(r"`(\w+)`", values)
        if "_common" in named:
            named = [*(bare := named[:-1]), *(f"{name}_common" for name in bare)]
        assert callback == f"`{type(probe).__name__}`"
        assert named == list(probe.trace.values)
        assert axis == probe.trace.axis
