"""The sentences of the demo world, one phrasebook per language.

A phrasebook is a TOML file in `datasets/world/`: questions, answers and names, index by index the
same in every language. Slots in braces are filled with names that already have the right form.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from moescope.probe.shipped import shipped_path

#: Languages of the world, the best resourced first.
LANGUAGES = ("en", "zh", "de", "es", "fr", "ru", "ja", "el")


@dataclass(frozen=True)
class Phrasebook:
    """All sentences of one language.

    Attributes:
        code: the language's code, such as `en`.
        separator: what stands between two sentences (nothing in Chinese and Japanese).
        data: the file as read.
    """

    code: str
    separator: str
    data: Mapping[str, Any]

    def texts(self, path: str) -> tuple[str, ...]:
        """The list of texts at a dotted path, such as `events.questions`."""
        value = self._at(path)
        if not isinstance(value, list):
            raise TypeError(f"{path} of the phrasebook {self.code} is not a list")
        return tuple(value)

    def text(self, path: str) -> str:
        """The single text at a dotted path, such as `flags.answer`."""
        value = self._at(path)
        if not isinstance(value, str):
            raise TypeError(f"{path} of the phrasebook {self.code} is not a text")
        return value

    def _at(self, path: str) -> object:
        value: Any = self.data
        for key in path.split("."):
            value = value[key]
        return value


@cache
def phrasebook(code: str) -> Phrasebook:
    """The phrasebook of a language, by its code."""
    data = tomllib.loads(shipped_path("world", f"{code}.toml").read_text(encoding="utf-8"))
    return Phrasebook(code=data["lang"], separator=data["separator"], data=data)


def sentence(text: str) -> str:
    """`text` with a capital first letter; scripts without capitals stay as they are."""
    return text[:1].upper() + text[1:]
