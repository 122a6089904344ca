"""The figures that an earlier report left: one that would come out the same is not drawn again."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Concatenate, ParamSpec

import matplotlib

from bnbench.report.drawing import Drawing, file_head

Content = ParamSpec("Content")


@dataclass(frozen=True)
class Album:
    """A folder with the figures of an earlier report, or nothing."""

    folder: Path | None = None

    def draw(
        self,
        draw: Callable[Concatenate[str, Content], Drawing],
        name: str,
        *content: Content.args,
        **looks: Content.kwargs,
    ) -> Drawing:
        """What `draw(name, *content, **looks)` gives; from its file, where that has been drawn already.

        A file is taken where this name was drawn from equal content by the same code.
        """
        # What is drawn is plain values, which are equal where their texts are.
        shown = repr((draw.__qualname__, name, content, looks)).encode()
        key = hashlib.sha256(_code() + shown).hexdigest()[:32]
        return self._kept(name, key) or replace(draw(name, *content, **looks), key=key)

    def _kept(self, name: str, key: str) -> Drawing | None:
        try:
            text = (self.folder / f"{name}.svg").read_bytes().decode() if self.folder else ""
        except (OSError, UnicodeDecodeError):
            return None
        head = file_head(key)
        title = re.search("<title>(.*?)</title>", text, re.DOTALL)
        if title is None or not (text.startswith(head) and text.endswith("</svg>\n")):
            return None
        return Drawing(name, unescape(title[1]), "<svg " + text[len(head) : -1], key)


@functools.cache
def _code() -> bytes:
    """Stands for all code that a figure depends on: a change of any file of the package counts."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(matplotlib.__version__.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.digest()
