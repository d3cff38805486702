"""Text made comparable: one form of characters, quotes and spaces; words and scripts counted.

Scripts written without spaces (Han, Kana, Thai, ...) count characters where others count words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

_QUOTES = str.maketrans({
    "‘": "'", "’": "'", "ʼ": "'", "′": "'", "`": "'", "´": "'", "‛": "'",
    "“": '"', "”": '"', "„": '"', "‟": '"', "«": '"', "»": '"', "″": '"',
    "−": "-", "ё": "е", "Ё": "Е", "أ": "ا", "إ": "ا", "آ": "ا", "ى": "ي", "ـ": None,
})  # fmt: skip
_INVISIBLE = re.compile("[\u064b-\u0652\u0670\u200b-\u200f\u2060\ufeff\u00ad]")
_SPACES = re.compile(r"[^\S\n]+")

#: Unicode name prefixes of scripts written without spaces between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC")


def plain(text: str) -> str:
    """`text` in NFKC, with straight quotes, е for ё, bare Arabic letters and single spaces.

    Line breaks stay; case is left as it is.
    """
    # Before NFKC, which takes a spacing acute apart.
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES)).translate(_QUOTES)
    return _SPACES.sub(" ", _INVISIBLE.sub("", text)).strip()


@lru_cache(maxsize=8192)
def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script written without spaces between words."""
    return character > "\u0dff" and unicodedata.name(character, "").startswith(_UNSPACED)


@lru_cache(maxsize=8192)
def is_word_character(character: str) -> bool:
    """Whether a character can stand inside a word: letters, digits and the marks on them."""
    return unicodedata.category(character)[0] in "LMN"


def words(text: str) -> list[str]:
    """The words of a text in lower case; unspaced scripts give one entry per character."""
    return list(_words(text.casefold()))


def _words(text: str) -> Iterator[str]:
    word = ""
    for character in text:
        if is_unspaced(character):
            if word:
                yield word
            word = ""
            if is_word_character(character):
                yield character
        elif is_word_character(character) or (character == "'" and word):
            word += character
        else:
            if word:
                yield word
            word = ""
    if word:
        yield word


@lru_cache(maxsize=8192)
def script_of(character: str) -> str | None:
    """`LATIN`, `CYRILLIC`, `HAN`, `KANA`, ... of a letter; None for all that is no letter."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "").split(" ")[0]
    if name.startswith("CJK"):
        return "HAN"
    if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"):
        return "KANA"
    return name or None
