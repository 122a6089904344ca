"""A user's own question: what stands in place of a study's data, model, norm, seeds and target."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnbench.registry import BadInput
from bnbench.study import checks
from bnbench.study.trial import check_fields, shown

#: Of a folder.
LONGEST_NAME = 80
_BY_OPTION = {
    "data": "--data", "model": "--model", "norm": "--norm", "norm_options": "a norm with other defaults",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What replaces what in a design; None and nothing leave it as it is.

    `norm` stands wherever the norm is "batch". `replicates` is the number of seeds. `target` is the
    validation accuracy to which studies of speed count. `changes` are fields of every row; options among
    them are those of the new data and model.
    """

    data: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    norm: str | None = None
    replicates: int | None = None
    target: float | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.replicates is not None:
            checks.check_whole("the number of seeds", self.replicates, least=1)
        if self.target is not None and not 0 < checks.number("the target accuracy", self.target) < 1:
            raise BadInput(f"the target accuracy is a share between 0 and 1, not {shown(self.target)}")
        check_fields(self.changes, "a row")
        for name in self.changes:
            if name in _BY_OPTION:
                raise BadInput(f"{name!r} cannot be set for every row; use {_BY_OPTION[name]}")
        checks.check_changes("what is set for every row", self.changes)

    @property
    def moves(self) -> bool:
        """Whether cells become others, by other data or another model."""
        return self.data is not None or self.model is not None

    @property
    def data_label(self) -> str:
        """The data in a name: that of a folder is its own."""
        return word_for(Path(self.data_options.get("path", self.data)).name) if self.data else ""

    @property
    def words(self) -> str:
        """What is asked otherwise, as in `on images with my.Net, norm=group, 20 seeds`."""
        places = [f"on {self.data_label}"] if self.data else []
        places += [f"with {word_for(self.model)}"] if self.model else []
        more = [f"norm={word_for(self.norm)}"] if self.norm else []
        more += [f"{self.replicates} seeds"] if self.replicates else []
        more += [f"target={self.target:g}"] if self.target else []
        more += [
            f"{name}={word_for(json.dumps(value, ensure_ascii=False))}"
            for name, value in self.changes.items()
        ]
        return ", ".join(filter(None, [" ".join(places), *more]))

    def name_for(self, study: str) -> str:
        """The name of the study that asks this in another one's design."""
        name = f"{study}{' ' if self.moves else ', '}{self.words}"
        if len(name) <= LONGEST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return f"{name[: LONGEST_NAME - 9].rstrip(' ,.=-')}-{digest}"


def word_for(text: str) -> str:
    """A text in the signs that names may have."""
    signs = re.sub(r"\.{2,}", ".", re.sub(r"[^\w.+%=-]+", ".", text))
    return re.sub(r"^[\W_]+|[\W_]+$", "", signs) or "x"
