"""What a declaration's values must be: every check names the place and the right thing in one line."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from bnbench.registry import BadInput, nearest
from bnbench.study.trial import Trial, check_fields, shown

# What the design itself says: its grid, its replicates, which rows read test data, and which are probed.
_NOT_FOR_ARMS = ("lr", "seed", "data_seed", "score_on", "probes")
_SIGNS = " _.-+=,%·×"

T = TypeVar("T")


def check_name(kind: str, name: object) -> None:
    """A name becomes a folder: letters of any script, their marks, digits, and a few signs between them."""
    text = name if isinstance(name, str) else ""
    word = [unicodedata.category(sign)[0] in "LMN" for sign in text]
    signs = all(fits or sign in _SIGNS for sign, fits in zip(text, word, strict=True))
    if not (0 < len(text) <= 80 and word[0] and word[-1] and signs and ".." not in text):
        raise BadInput(
            f"{kind} name {shown(name)} cannot be used for a folder: letters, digits, spaces and"
            " . _ - + = , % · ×, 80 at most, no '..', a letter or digit at both ends"
        )


def check_changes(where: str, changes: Mapping[str, Any], *more_fields: str) -> None:
    """Changes to a row, of any field that is not the design's; `more_fields` are only suggested."""
    check_fields(changes, where, more_fields)
    for name in _NOT_FOR_ARMS:
        if name in changes:
            raise BadInput(f"{where} cannot set {name!r}: the design does, for all arms alike")
    try:
        Trial(**changes)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def check_text(where: str, value: object) -> None:
    """A text that says something."""
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{where} must be a text, not {shown(value)}")


def check_choice(where: str, value: object, known: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in known:
        raise BadInput(f"{where} is {shown(value)}{nearest(str(value), known)}")


def check_whole(where: str, value: object, least: int) -> None:
    """A whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadInput(f"{where} must be a whole number of {least} or more, not {shown(value)}")


def number(where: str, value: Any, above: float = -math.inf) -> float:
    """A finite number, as a float."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not (plain and -1e300 < value < 1e300 and value > above):
        wanted = "a finite number" + ("" if above == -math.inf else f" above {above:g}")
        raise BadInput(f"{where} must be {wanted}, not {shown(value)}")
    return float(value)


def numbers(where: str, values: Any, above: float = -math.inf) -> dict[str, float]:
    """Finite numbers by name."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise BadInput(f"{where} must be numbers by name, such as {{'name': 0.5}}, not {shown(values)}")
    return {name: number(f"{where} {name!r}", value, above) for name, value in values.items()}


def several(where: str, values: Any, kind: type[T], least: int = 0) -> tuple[T, ...]:
    """A tuple of one kind of thing. The usual slip is the comma that a tuple of one needs."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise BadInput(f"{where} must be a tuple, such as (a, b) or (a,), not {shown(values)}")
    for value in values:
        if not isinstance(value, kind):
            raise BadInput(f"{where} must hold {kind.__name__} only, not {shown(value)}")
    if len(values) < least:
        raise BadInput(f"{where} is empty; give at least one")
    return tuple(values)


def check_known(where: str, name: str, known: Sequence[str]) -> None:
    """A name that is declared somewhere else."""
    if name not in known:
        raise BadInput(f"{where} {name!r} that is not declared{nearest(name, known)}")


def check_unique(kind: str, names: Sequence[str]) -> None:
    """Names that tell things apart."""
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{kind} {name!r} is declared twice; give one of them another name")
