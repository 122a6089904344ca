"""Registries: misses, duplicates, discovery in a package and by entry points."""

import importlib
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.registry import BadInput, Registry, nearest


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path with a package of fruits, and another distribution that adds one."""
    files = {
        "fruits/__init__.py": "from bnbench.registry import Registry\nFRUITS = Registry('fruit', 'fruits')\n",
        "fruits/apple.py": "from fruits import FRUITS\nFRUITS.add('apple', 1)\n",
        "fruits/pear.py": "from fruits import FRUITS\nFRUITS.add('pear', 2)\n",
        "foreign_fig.py": "from fruits import FRUITS\nFRUITS.add('fig', 3)\n",
        "foreign_fig-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: foreign-fig\nVersion: 1.0\n",
        "foreign_fig-1.0.dist-info/entry_points.txt": "[fruits]\nfig = foreign_fig\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in [name for name in sys.modules if name.split(".")[0] in ("fruits", "foreign_fig")]:
        del sys.modules[module]


def test_entries_come_from_the_package_and_from_entry_points(site):
    fruits = importlib.import_module("fruits").FRUITS
    assert dict(fruits) == {"apple": 1, "fig": 3, "pear": 2}
    assert list(fruits) == ["apple", "fig", "pear"]
    assert len(fruits) == 3
    assert "fig" in fruits and "grape" not in fruits and 7 not in fruits


def test_each_way_to_look_discovers(site):
    package = importlib.import_module("fruits")
    for look in (lambda: package.FRUITS["fig"], lambda: "fig" in package.FRUITS, lambda: len(package.FRUITS)):
        package.FRUITS = Registry("fruit", "fruits")
        for name in ("fruits.apple", "fruits.pear", "foreign_fig"):
            sys.modules.pop(name, None)
        assert look() == 3 or look() is True


def test_a_miss_names_the_nearest_and_all_others(site):
    fruits = importlib.import_module("fruits").FRUITS
    with pytest.raises(BadInput) as caught:
        fruits["aple"]
    assert str(caught.value) == "no fruit named 'aple'; did you mean 'apple'? Known: apple, fig, pear"
    with pytest.raises(BadInput) as caught:
        fruits["zzz"]
    assert str(caught.value) == "no fruit named 'zzz'. Known: apple, fig, pear"


def test_a_name_is_taken_once(site):
    fruits = importlib.import_module("fruits").FRUITS
    assert fruits["apple"] == 1
    with pytest.raises(BadInput, match="the fruit 'apple' is registered twice"):
        fruits.add("apple", 4)
    assert fruits["apple"] == 1


@given(st.text(), st.lists(st.text(alphabet="abcdef_", min_size=1)))
def test_the_nearest_word_is_always_one_line_of_known_words(word, known):
    text = nearest(word, known)
    assert text.endswith(f"Known: {', '.join(sorted(known)) or 'none'}")
    assert "\n" not in text


def test_a_norm_of_another_package_is_found_by_its_entry_point(tmp_path):
    """In a fresh process, since the registry of norms looks once."""
    (tmp_path / "my_norms.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            from bnbench.norms import norm


            @norm("halve", paper="none", batch_dependent=False, scale_invariant=False)
            class Halve(nn.Module):
                def __init__(self, num_features, dim=2):
                    super().__init__()

                def forward(self, x):
                    return x / 2
            """
        )
    )
    info = tmp_path / "my_norms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-norms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bnbench.norms]\nhalve = my_norms\n")
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from bnbench.norms import build_norm, norm_names
from bnbench.testing import check_norm
assert "halve" in norm_names(batch_dependent=False)
check_norm("halve", dims=(0, 2))
print(build_norm("halve", 8))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Halve()\n"


def test_importing_the_norms_needs_torch_and_neither_numpy_nor_lightning():
    program = """
import sys
import torch
before = set(sys.modules)
import bnbench.norms
bnbench.norms.norm_names()
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & {"numpy", "lightning", "mlflow"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
