"""What became of a prompt: correct, refused, partial, broken or other, judged on the answer alone.

Decided in this order: (a) it equals or contains the known right answer: `correct`; (b) it refuses:
`refused`, or `partial` where it answers all the same; (c) it is empty, loops, or is written in the
wrong script for its language: `broken`; else `other`. A wrong but fluent answer is `other`; one of
word salad in the right script needs a language model to be told and is `other` here too.

Rules and word lists only: no torch, no model. `DETECTOR` names their version; a change that can
change a verdict raises it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from moescope.probe.language_scripts import scripts_of_language
from moescope.probe.plain_text import (
    is_unspaced,
    is_word_character,
    plain,
    script_of,
    words,
)
from moescope.probe.refusal import Refusal, find_refusal, without_thinking

#: Name and version of the rules, kept with every verdict.
DETECTOR: Final = "rules-2"

Outcome = Literal["correct", "other", "partial", "refused", "broken"]

#: All outcomes, the best first.
OUTCOMES: Final[tuple[Outcome, ...]] = ("correct", "other", "partial", "refused", "broken")


Detector = Callable[[str], Refusal | None]
"""Says whether an answer refuses; a function of one's own is known by its name in verdicts."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one answer.

    Attributes:
        outcome: one of `OUTCOMES`.
        detector: name and version of what judged.
        reason: what decided, in a few words, such as `refusal:de` or `loop`.
    """

    outcome: Outcome
    detector: str = DETECTOR
    reason: str = ""


def judge(
    response: str,
    *,
    expected: str | None,
    lang: str | None,
    truncated: bool = False,
    detector: Detector = find_refusal,
) -> Judgement:
    """Judge one answer.

    Args:
        response: what the model wrote; thinking blocks are left out here.
        expected: the known right answer, or None where there is none.
        lang: the prompt's language (`de`, `deu_Latn`, `pt-BR`), for the script; None skips that.
        truncated: whether it was cut at the length limit; a finished answer is allowed more
            repetition (songs, lists) than one that never ended.
        detector: says whether an answer, thinking left out, refuses: the rules of
            `moescope.probe.refusal`, or any function of yours (a classifier, a judge model).
    """
    found = _judged(response, expected, lang, truncated=truncated, detector=detector)
    if detector is find_refusal:
        return found
    return replace(found, detector=getattr(detector, "__name__", type(detector).__name__))


def _judged(
    response: str,
    expected: str | None,
    lang: str | None,
    *,
    truncated: bool,
    detector: Detector,
) -> Judgement:
    answer = plain(without_thinking(response))
    if expected is not None and contains_answer(answer, expected):
        return Judgement("correct", reason="expected answer")
    refusal = detector(answer)
    if refusal is not None:
        outcome: Outcome = "partial" if refusal.is_partial else "refused"
        return Judgement(outcome, reason=f"refusal:{refusal.lang}")
    if not words(answer):
        return Judgement("broken", reason="empty")
    if loops(answer, truncated=truncated):
        return Judgement("broken", reason="loop")
    if lang is not None and has_wrong_script(answer, lang):
        return Judgement("broken", reason="script")
    return Judgement("other")


def contains_answer(response: str, expected: str) -> bool:
    """Whether a response equals or contains the right answer.

    Character forms, quotes, case, spaces and final punctuation make no difference. Containment
    counts between word boundaries; scripts without spaces have none. An answer of one letter
    (a choice such as `B`) must begin the response.
    """
    text, wanted = _bare(response), _bare(expected)
    if not wanted:
        return False
    if text == wanted:
        return True
    is_choice = len(wanted) == 1 and script_of(wanted) == "LATIN"
    start = text.find(wanted)
    while start >= 0:
        if _is_bounded(text, start, start + len(wanted)):
            return start == 0 if is_choice else True
        start = text.find(wanted, start + 1)
    return False


def _bare(text: str) -> str:
    """Folded text on one line without punctuation at its ends."""
    folded = " ".join(plain(text).casefold().split())
    ends = [at for at, character in enumerate(folded) if is_word_character(character)]
    if not ends:
        return folded  # an answer may be a sign, such as an emoji
    first = ends[0]
    if folded[first].isdigit() and folded[:first].endswith("-"):
        first -= 1  # a sign
    return folded[first : ends[-1] + 1]


def _is_bounded(text: str, start: int, end: int) -> bool:
    before, after = text[:start], text[end:]
    if before and _joins(before[-1], text[start]):
        return False
    if after and _joins(text[end - 1], after[0]):
        return False
    # 3 is not found in 3.5, nor 500 in 1,500, nor 5 in -5.
    if text[end - 1].isdigit() and re.match(r"[.,]\d", after):
        return False
    return not (text[start].isdigit() and re.search(r"\d[.,]$|(?:^|\W)-$", before))


def _joins(left: str, right: str) -> bool:
    """Whether two neighbors stand inside one word of a script with spaces.

    Korean particles and digits next to letters of unspaced scripts do not make a longer word.
    """
    if is_unspaced(left) or is_unspaced(right):
        return False
    if script_of(left) == "HANGUL":
        return False
    return is_word_character(left) and is_word_character(right)


def loops(text: str, *, truncated: bool) -> bool:
    """Whether a block of words or letters, repeated over and over, makes up most of a text.

    A block must come at least four times in a row (single characters of unspaced scripts eight
    times) and cover half of a truncated text, or four fifths of one that ended by itself.
    """
    share = 0.5 if truncated else 0.8
    units = words(text)
    if _longest_repetition(units) >= max(4, share * len(units)):
        return True
    longest = max(units, key=len, default="")
    run = re.search(r"(.{1,8}?)\1{7,}", longest)
    return run is not None and len(run.group()) >= share * len("".join(units))


#: Units of the longest block whose repetition is looked for; models loop in less.
_LONGEST_BLOCK = 50


def _longest_repetition(units: list[str]) -> int:
    """Most units covered by one block that repeats at least four times in a row."""
    best = 0
    for size in range(1, min(len(units) // 4, _LONGEST_BLOCK) + 1):
        run = 0
        for at in range(size, len(units)):
            run = run + 1 if units[at] == units[at - size] else 0
            covered = run + size
            times = 8 if size == 1 and is_unspaced(units[at][0]) else 4
            if covered >= times * size:
                best = max(best, covered)
    return best


def has_wrong_script(text: str, lang: str) -> bool:
    """Whether most letters of a text, and more than a name's worth, are foreign to its language."""
    expected = scripts_of_language(lang)
    scripts = [script for script in map(script_of, text) if script is not None]
    foreign = [script for script in scripts if script not in expected]
    if not expected or len(foreign) <= 0.5 * len(scripts):
        return False
    # One or two foreign words are a name, a formula or a term.
    alien_words = [w for w in words(text) if (script := script_of(w[0])) and script not in expected]
    return len(alien_words) > 2
