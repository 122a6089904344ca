"""The BibTeX entries of the papers behind the norms, from the file beside this one."""

from __future__ import annotations

import functools
import re
from pathlib import Path

_FILE = Path(__file__).with_name("papers.bib")
_ENTRY = re.compile(r"^@\w+\{.*?^\}", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"^ *(eprint|doi) *= *\{([^}]+)\}", re.MULTILINE)
_KINDS = {"arXiv": "eprint", "doi": "doi"}


def bibtex(paper: str) -> str | None:
    """Return the BibTeX entry of a paper, as in `bibtex("arXiv:1502.03167")`; None where the file has none.

    A paper is "arXiv:" or "doi:" with the number, as in a norm's trait `paper`.
    """
    kind, _, number = paper.partition(":")
    return _entries().get((_KINDS.get(kind, ""), number))


def web_address(paper: str) -> str | None:
    """Return where a paper can be read; None where its text is no arXiv number and no DOI."""
    kind, _, number = paper.partition(":")
    return {"arXiv": f"https://arxiv.org/abs/{number}", "doi": f"https://doi.org/{number}"}.get(kind)


@functools.cache
def _entries() -> dict[tuple[str, str], str]:
    """Every entry by each number that it has."""
    text = _FILE.read_text(encoding="utf-8")
    return {
        (kind, number): entry.group()
        for entry in _ENTRY.finditer(text)
        for kind, number in _NUMBER.findall(entry.group())
    }
