"""The page docs/norms.md, from the registered norms and their docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from bnbench.cli.norms import NORM, REPARAM, RESIDUAL, Method, norm_row
from bnbench.norms.papers import bibtex, web_address

_HEAD = """# Normalizers

<!-- Written by `bnbench norms --markdown > docs/norms.md`; change the docstrings, not this file. -->

Every layer is built by `build_norm(name, num_features, dim, **options)`, takes x of shape (N, C, \\*), and
can be an arm of any study. `bnbench norms` lists what is installed, plug-ins included, and
`bnbench norms show NAME` explains one.
"""


def page_of(methods: Sequence[Method]) -> str:
    """The whole page: tables of all, then a section for each norm and reparametrization."""
    return "\n".join(_lines(methods))


def _lines(methods: Sequence[Method]) -> Iterator[str]:
    norms = [method for method in methods if method.kind == NORM]
    yield _HEAD
    yield "| Norm | Depends on | Running | Parameters | Activation | Paper |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for method in norms:
        yield f"| [{method.name}](#{method.name}) | {' | '.join(norm_row(method))} | {_link(method.paper)} |"
    for kind, title, how in (
        (REPARAM, "Reparametrizations", "`apply_reparam(layer, name)`, or `reparam=` of an arm"),
        (RESIDUAL, "Residual options", '`model_options={"residual": ...}` of residual networks'),
    ):
        yield f"\n{title} go with any norm: {how}.\n"
        yield "| Name | | Paper |\n| --- | --- | --- |"
        for method in methods:
            if method.kind == kind:
                name = f"[{method.name}](#{method.name})" if kind == REPARAM else method.name
                yield f"| {name} | {_prose(method.summary)} | {_link(method.paper)} |"
    for method in methods:
        if method.kind != RESIDUAL:
            yield from _section(method)
    yield from _papers(methods)


def _section(method: Method) -> Iterator[str]:
    yield f"\n## {method.name}\n"
    for paragraph in _paragraphs(method):
        yield paragraph + "\n"
    if method.options:
        options = (f"`{name}: {text}`" for name, text in method.options.items())
        yield f"Options: {', '.join(options)}.\n"
    address = web_address(method.paper)
    if address is not None:
        yield f"Paper: [{method.paper}]({address})."


def _paragraphs(method: Method) -> Iterator[str]:
    """The docstring's paragraphs as Markdown; those that are indented there are formulas."""
    starts = rf"^(?=(?:Raises|Pitfalls:|Source:|(?:{'|'.join(method.options) or '-'})[:=]) ?)"
    for paragraph in re.split(r"\n{2,}", method.about):
        if paragraph.startswith(" "):
            yield f"```text\n{paragraph}\n```"
            continue
        for piece in re.split(starts, paragraph, flags=re.MULTILINE):
            if piece.strip():
                prose = _prose(piece.strip())
                yield re.sub(r"^(Pitfalls|Source):", r"**\1:**", prose)


def _prose(text: str) -> str:
    """Text in which Markdown sees no emphasis where a formula has a star or an underscore."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"[*<|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)


def _link(paper: str) -> str:
    address = web_address(paper)
    return "" if address is None else f"[{paper}]({address})"


def _papers(methods: Sequence[Method]) -> Iterator[str]:
    """The BibTeX entries, each once."""
    entries = dict.fromkeys(entry for method in methods if (entry := bibtex(method.paper)) is not None)
    yield "\n## BibTeX\n\n```bibtex"
    yield "\n\n".join(entries)
    yield "```\n"
