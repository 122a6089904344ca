"""What every norm says of itself: a formula, pitfalls, a source, a citation; and the page made of it."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections import Counter
from pathlib import Path

import pytest

from bnbench.cli.app import call
from bnbench.norms import NORMS, REPARAMS
from bnbench.norms.papers import bibtex, web_address

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "norms.md"
BIB = (ROOT / "bnbench" / "norms" / "papers.bib").read_text()
DOCSTRINGS = {
    **{name: inspect.getdoc(entry.layer) or "" for name, entry in NORMS.items()},
    **{name: inspect.getdoc(entry.apply) or "" for name, entry in REPARAMS.items()},
}
PAPERS = {name: entry.paper for registry in (NORMS, REPARAMS) for name, entry in registry.items()}


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_a_docstring_has_a_sentence_a_formula_pitfalls_and_a_source(name: str) -> None:
    text = DOCSTRINGS[name]
    assert text.partition("\n\n")[0].endswith("."), "the first paragraph is one sentence"
    formula, _, pitfalls = text.partition("\nPitfalls: ")
    assert "=" in formula, "a formula stands before the pitfalls"
    assert name in REPARAMS or "(N, C, *)" in formula, "the formula says the shape of x"
    assert pitfalls, "a paragraph begins with 'Pitfalls: '"
    assert re.search(r"^Source: \S", pitfalls, re.MULTILINE), "the last paragraph begins with 'Source: '"


@pytest.mark.parametrize("name", [name for name, paper in PAPERS.items() if paper != "none"])
def test_every_paper_is_cited(name: str) -> None:
    entry = bibtex(PAPERS[name])
    assert entry is not None, f"{PAPERS[name]} has no entry in bnbench/norms/papers.bib"
    assert PAPERS[name].partition(":")[2] in entry


def test_every_citation_has_its_fields_and_stands_there_once() -> None:
    entries = re.split(r"^(?=@)", BIB, flags=re.MULTILINE)[1:]
    assert len(entries) > 30
    for entry in entries:
        fields = dict(re.findall(r"^  (\w+) = \{(.+)\},$", entry, re.MULTILINE))
        assert {"title", "author", "year"} < fields.keys(), entry
        assert entry.count("{") == entry.count("}")
        assert all(name.count(",") == 1 for name in fields["author"].split(" and ")), entry
        # Papers of a conference are there before it, and an arXiv number begins with the year and month.
        number = fields.get("eprint")
        assert (number or fields["doi"]) and (number is None or re.fullmatch(r"\d{4}\.\d{5}", number))
        if number is not None:
            assert 0 <= int(fields["year"]) - 2000 - int(number[:2]) <= 1, entry
    for mark in (r"^@\w+\{(\w+),$", r"eprint = \{(.+)\}", r"^  title = \{(.+)\},$"):
        found = Counter(re.findall(mark, BIB, re.MULTILINE))
        assert max(found.values()) == 1, found.most_common(1)


def test_a_paper_is_found_by_either_number_and_a_strange_one_is_not() -> None:
    assert "Ioffe, Sergey and Szegedy, Christian" in str(bibtex("arXiv:1502.03167"))
    assert "Communications of the ACM" in str(bibtex("doi:10.1145/3065386"))
    assert bibtex("doi:1502.03167") is None
    assert bibtex("none") is None
    assert web_address("arXiv:1502.03167") == "https://arxiv.org/abs/1502.03167"
    assert web_address("doi:10.1145/3065386") == "https://doi.org/10.1145/3065386"
    assert web_address("none") is None


def test_the_page_is_what_the_command_writes() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert call(["norms", "--markdown"]) == 0
    assert PAGE.read_text() == printed.getvalue(), "stale: bnbench norms --markdown > docs/norms.md"


def test_the_page_has_every_norm_and_its_links_lead_somewhere() -> None:
    page = PAGE.read_text()
    sections = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert sections == [*NORMS, *REPARAMS, "BibTeX"]
    assert set(re.findall(r"\]\(#(\w+)\)", page)) == {*NORMS, *REPARAMS}
