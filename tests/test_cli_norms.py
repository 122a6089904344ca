"""`bnbench norms`: the list, one entry in full, and one line for a name that is not there."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from torch import nn

from bnbench.cli.app import call
from bnbench.cli.norms import RESIDUALS, count_parameters, methods
from bnbench.models.residual import Residual
from bnbench.norms import NORMS, REPARAMS, NormEntry, build_norm

NAMES = [*NORMS, *REPARAMS, *RESIDUALS]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Norms may be added for the time of a test."""
    monkeypatch.setattr(NORMS, "_entries", dict(NORMS._entries))
    return monkeypatch


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `bnbench norms` prints with these arguments."""
    assert call(["norms", *arguments]) == 0
    return capsys.readouterr().out


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    lines = [line.split() for line in out.splitlines()]
    firsts = [words[0] for words in lines if words]
    assert [name for name in firsts if name in NAMES] == NAMES
    by_name = {words[0]: " ".join(words[1:]) for words in lines if words}
    assert by_name["batch"] == "the batch yes 2C arXiv:1502.03167"
    assert by_name["layer"] == "the sample 2C arXiv:1607.06450"
    assert by_name["rms"] == "the sample C arXiv:1910.07467"
    assert by_name["none"].startswith("the sample 0")
    assert max(map(len, out.splitlines())) <= 140


def test_json_has_all_traits(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(printed(capsys, "--json"))}
    assert list(rows) == NAMES
    ghost = rows["ghost_batch"]
    assert (ghost["kind"], ghost["batch_dependent"], ghost["running_stats"]) == ("norm", True, True)
    assert (ghost["parameters"], ghost["options"]["ghost_size"]) == ("2C", "int = 32")
    assert ghost["permutation_equivariant"] is False
    assert "Train Longer" in ghost["bibtex"]
    assert rows["weight_standardization"]["options"] == {"eps": "float = 1e-05"}
    assert rows["fixup"]["kind"] == "residual option"


def test_show_prints_formula_pitfalls_options_traits_and_citation(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "show", "ghost_batch")
    for piece in (
        "y = γ (x − μ_k) / √(σ_k² + eps) + β",
        "\nPitfalls: ",
        "\n  ghost_size  int = 32\n",
        "\n  running_stats            yes\n",
        "\n  parameters               2C\n",
        "https://arxiv.org/abs/1705.08741",
        "@inproceedings{hoffer2017train,",
    ):
        assert piece in out
    assert json.loads(printed(capsys, "show", "ghost_batch", "--json"))["name"] == "ghost_batch"


@pytest.mark.parametrize("name", NAMES)
def test_show_takes_every_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "show", name)
    assert out.startswith(f"{name} (")
    # Marks of documentation tools are not for a terminal.
    assert ":class:" not in out and ":func:" not in out and ":mod:" not in out
    assert ("@" in out) == (name != "none")


def test_a_name_that_is_not_there_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["norms", "show", "gost_batch"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert "no norm, reparametrization or residual option named 'gost_batch'" in err
    assert "did you mean 'ghost_batch'?" in err
    assert call(["norms", "shwo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("learned", "text"),
    [
        (lambda channels: channels, "C"),
        (lambda channels: 3 * channels + 2, "3C + 2"),
        (lambda channels: 1, "1"),
        (lambda channels: channels // 2, "32 at C = 64"),
        (lambda channels: min(channels, 128), "64 at C = 64"),
    ],
)
def test_parameters_are_told_as_a_function_of_the_channels(
    learned: object, text: str, registered: pytest.MonkeyPatch
) -> None:
    def build(num_features: int, dim: int = 2) -> nn.Module:
        return nn.Linear(learned(num_features), 1, bias=False)  # type: ignore[operator]

    entry = NormEntry(**{**vars(NORMS["none"]), "name": "made", "layer": build})
    NORMS.add("made", entry)
    assert count_parameters(entry) == text


def test_parameters_are_those_of_real_layers() -> None:
    told = {method.name: method.parameters for method in methods() if method.kind == "norm"}
    for name, entry in NORMS.items():
        layer = build_norm(name, 64, max(2, entry.min_dim), **entry.examples[0])
        count = sum(parameter.numel() for parameter in layer.parameters())
        text = told[name].replace(" at C = 64", "")
        text = text.replace("C", "*64") if text[0].isdigit() else text.replace("C", "64")
        assert eval(text) == count, name


def test_residual_options_are_those_of_the_networks() -> None:
    assert {"plain", *RESIDUALS} == set(get_args(Residual))
