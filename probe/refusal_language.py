"""How refusals of one language are told: regular expressions, each for one sentence.

Each language has three lists. `refusals` hold the speaker's *own* inability, ban or unwillingness
to answer, help or tell; general forms, never whole sentences of some model. `not_refusals` are
idioms that look alike. `about_the_request` are words by which a sentence is about the request, the
rules or other help, so that it is no answer. To add a
language, add an entry to `moescope.probe.refusal.PHRASES`.

Expressions see text as `moescope.probe.plain_text.plain` leaves it: NFKC, straight quotes, no vowel
marks in Arabic, е for ё; case is ignored. `~` stands for at most 60 characters in between.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """The expressions of one language; see the module."""

    refusals: tuple[str, ...]
    not_refusals: tuple[str, ...] = ()
    about_the_request: tuple[str, ...] = ()

    @cached_property
    def refusal(self) -> re.Pattern[str]:
        """Matches a sentence that refuses."""
        return _any_of(self.refusals)

    @cached_property
    def idiom(self) -> re.Pattern[str]:
        """Matches what looks like a refusal and is none."""
        return _any_of(self.not_refusals)

    @cached_property
    def request_word(self) -> re.Pattern[str]:
        """Matches a sentence about the request rather than about its subject."""
        return _any_of(self.about_the_request)


def _any_of(expressions: tuple[str, ...]) -> re.Pattern[str]:
    if not expressions:
        return re.compile(r"(?!)")
    joined = "|".join(f"(?:{expression})" for expression in expressions).replace("~", ".{0,60}?")
    return re.compile(unicodedata.normalize("NFKC", joined), re.IGNORECASE)
