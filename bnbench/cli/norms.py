"""`bnbench norms`: the normalizers and what goes with them, listed, explained, and as a page of the docs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bnbench.norms import NORMS, REPARAMS, NormEntry, build_norm
from bnbench.norms.base import TRAITS
from bnbench.norms.papers import bibtex, web_address
from bnbench.registry import BadInput, nearest

NORM, REPARAM, RESIDUAL = "norm", "reparametrization", "residual option"

#: What residual networks have in place of a norm: the values of their model option `residual`.
RESIDUALS: Mapping[str, tuple[str, str]] = {
    "fixup": (
        "arXiv:1901.09321",
        "s + f with branches f that start at 0, smaller weights the deeper the net, and learned numbers in\n"
        "place of biases.",
    ),
    "skip_init": ("arXiv:2002.10444", "s + α f, α a learned number a branch that starts at 0."),
    "rezero": (
        "arXiv:2003.04887",
        "s + α f, α as in skip_init, with nothing behind the addition; the activation ends the branch.",
    ),
}


@dataclass(frozen=True)
class Method:
    """One entry of the list: what it is, its docstring, and for a norm its traits and parameters.

    options: each with its type and default, as they stand in the signature.
    parameters: how many learned numbers a layer of C channels has, as in "2C".
    """

    name: str
    kind: str
    paper: str
    about: str
    options: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)
    parameters: str = ""

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return self.about.split("\n\n", 1)[0].replace("\n", " ")

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, with the BibTeX entry where there is one."""
        values = {"name": self.name, "kind": self.kind, "paper": self.paper, **self.traits}
        if self.kind == NORM:
            values["parameters"] = self.parameters
        return {**values, "options": dict(self.options), "about": self.about, "bibtex": bibtex(self.paper)}


def print_norms(*, as_json: bool, as_markdown: bool) -> None:
    """Print the list, all of it as JSON, or the page of the docs."""
    found = methods()
    if as_json:
        print(json.dumps([method.as_dict() for method in found], indent=2, ensure_ascii=False))
    elif as_markdown:
        from bnbench.cli.norms_page import page_of

        print(page_of(found), end="")
    else:
        _print_list(found)


def print_norm(name: str, as_json: bool) -> None:
    """Print one entry: formula, pitfalls, options, traits, BibTeX. Raises BadInput for an unknown name."""
    known = {method.name: method for method in methods()}
    if name not in known:
        raise BadInput(f"no norm, reparametrization or residual option named {name!r}{nearest(name, known)}")
    method = known[name]
    if as_json:
        print(json.dumps(method.as_dict(), indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_explanation(method)))


def methods() -> list[Method]:
    """All norms and reparametrizations that are registered, then the residual options."""
    return [
        *(
            Method(
                name,
                NORM,
                entry.paper,
                plain_docstring(entry.layer),
                options_of(entry.layer),
                {trait: getattr(entry, trait) for trait in TRAITS},
                count_parameters(entry),
            )
            for name, entry in NORMS.items()
        ),
        *(
            Method(name, REPARAM, entry.paper, plain_docstring(entry.apply), options_of(entry.apply))
            for name, entry in REPARAMS.items()
        ),
        *(Method(name, RESIDUAL, paper, about) for name, (paper, about) in RESIDUALS.items()),
    ]


def plain_docstring(thing: Callable[..., object]) -> str:
    """The docstring without the marks that only a documentation tool reads."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", inspect.getdoc(thing) or "")


def options_of(layer: Callable[..., object]) -> dict[str, str]:
    """The keyword-only parameters, each as "type = default", as far as it has these."""
    return {
        option.name: _typed(option)
        for option in inspect.signature(layer).parameters.values()
        if option.kind is option.KEYWORD_ONLY
    }


def _typed(option: inspect.Parameter) -> str:
    kind, default = option.annotation, option.default
    words = [kind if isinstance(kind, str) else inspect.formatannotation(kind), f"= {default!r}"]
    return " ".join(words[kind is option.empty : 1 if default is option.empty else 2])


def count_parameters(entry: NormEntry) -> str:
    """The learned numbers of a layer as a function of its channels C: "2C", or "96 at C = 64"."""
    counts = []
    with torch.device("meta"):
        for channels in (64, 128, 256):
            layer = build_norm(entry.name, channels, max(entry.min_dim, 2), **entry.examples[0])
            counts.append(sum(parameter.numel() for parameter in layer.parameters()))
    slope, rest = divmod(counts[1] - counts[0], 64)
    constant = counts[0] - 64 * slope
    if rest or counts[2] != 256 * slope + constant:
        return f"{counts[0]} at C = 64"
    terms = ["" if slope == 0 else "C" if slope == 1 else f"{slope}C", str(constant) if constant else ""]
    return " + ".join(term for term in terms if term) or "0"


def _print_list(found: Sequence[Method]) -> None:
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 140
    table = Table(box=None, pad_edge=False)
    for head in ("norm", "depends on", "running", "parameters", "activation", "paper"):
        table.add_column(head)
    for method in found:
        if method.kind == NORM:
            table.add_row(method.name, *norm_row(method), method.paper)
    console.print(table)
    for kind in (REPARAM, RESIDUAL):
        table = Table(box=None, pad_edge=False)
        for head in (kind, "", "paper"):
            table.add_column(head)
        for method in found:
            if method.kind == kind:
                table.add_row(method.name, method.summary, method.paper)
        console.print()
        console.print(table, markup=False)
    console.print(
        "\n`bnbench norms show NAME` explains one. To an arm of a study and to NormClassifier they are"
        ' norm=NAME, reparam=NAME\nand model_options={"residual": NAME}; adaptive_clip=0.1 clips gradients.',
        highlight=False,
        markup=False,
    )


def norm_row(method: Method) -> list[str]:
    """What the list says of a norm: its dependence, running statistics, parameters, the activation."""
    traits = method.traits
    return [
        "the batch" if traits["batch_dependent"] else "the sample",
        "yes" if traits["running_stats"] else "",
        method.parameters,
        "replaces it" if traits["replaces_activation"] else "",
    ]


def _explanation(method: Method) -> Iterator[str]:
    """The pieces of `show`, one below the other."""
    yield f"{method.name} ({method.kind})"
    yield method.about
    if method.options:
        yield "\n".join(["Options:", *_columns(method.options)])
    if method.traits:
        facts = {**method.traits, "parameters": method.parameters}
        words = {True: "yes", False: "no"}
        texts = {name: words[fact] if isinstance(fact, bool) else str(fact) for name, fact in facts.items()}
        yield "\n".join(["Traits:", *_columns(texts)])
    address = web_address(method.paper)
    if address is not None:
        yield f"Paper: {address}"
    entry = bibtex(method.paper)
    if entry is not None:
        yield entry


def _columns(texts: Mapping[str, str]) -> list[str]:
    width = max(map(len, texts))
    return [f"  {name:<{width}}  {text}" for name, text in texts.items()]
