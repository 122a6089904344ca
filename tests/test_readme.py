"""What the README says can be done: its first example runs as it stands, and its files are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_every_file_that_it_links_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) >= 4
    assert not [link for link in links if not (README.parent / link).exists()]
