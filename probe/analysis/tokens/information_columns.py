"""The columns of the table `information`."""

from __future__ import annotations

from moescope.probe.analysis.columns import EXPERT, KIND, LAYER, NUM_PROMPTS, NUM_TOKENS
from moescope.probe.analysis.frame import Column

SOURCE = "mutual information: Cover and Thomas, Elements of Information Theory, 2.3"

_BEFORE = (
    Column(
        name="factor",
        unit="",
        range="token, previous_token, position, phase, segment, or a prompt field",
        definition="What is known about a token. Positions are taken together as 0, 1, 2-3, 4-7, "
        "8-15 and so on, counted from the start of the prompt.",
    ),
    LAYER,
    KIND,
)
_NUMBERS = (
    Column(
        name="num_values",
        unit="values",
        range="1 or more",
        definition="Values of the factor among the counted tokens.",
    ),
    Column(
        name="share_counted",
        unit="share of tokens",
        range="(0, 1]; 1 unless the token is given",
        definition="Counted tokens over all tokens with a value: given the token, only ids that "
        "occur often enough count.",
    ),
    NUM_TOKENS,
    NUM_PROMPTS,
    Column(
        name="num_units",
        unit="units",
        range="1 or more",
        definition="Units of resampling with a counted token.",
    ),
)


def information_columns(*, per_expert: bool) -> tuple[Column, ...]:
    """The columns, with an expert and with its use in place of the slot's expert if asked."""
    target = "whether a token selects the expert" if per_expert else "the expert of a slot"
    given = ", given the token where that was asked"
    missing = "missing for an expert that no token or every token selects; " if per_expert else ""
    measures = (
        Column(
            name="share",
            unit="share of H",
            range=f"at most 1; {missing}0 is chance; noise may fall below, and so "
            "may a factor that is balanced against another by design",
            definition=f"information / entropy_nats: what the factor tells about {target}{given}, "
            "as a share of all there is to tell.",
            source=SOURCE,
        ),
        Column(
            name="low",
            unit="share of H",
            range="at most 1",
            definition="Lower end of the 95 % interval of the share: computed again without each "
            "of up to 20 groups of units (delete-a-group jackknife), shuffled_nats held fixed.",
            source="Kott, J. Official Statistics 17, 2001",
        ),
        Column(
            name="high",
            unit="share of H",
            range="at most 1",
            definition="Upper end of the same interval.",
            source="Kott, J. Official Statistics 17, 2001",
        ),
        Column(
            name="p",
            unit="",
            range="[1 / (shuffles + 1), 1]; missing given the token",
            definition="(b + 1) / (B + 1): b of B shuffles tell as much as the factor.",
        ),
        Column(
            name="information",
            unit="nats",
            range="0 or more but for noise",
            definition="information_nats - shuffled_nats.",
        ),
        Column(
            name="information_nats",
            unit="nats",
            range="[0, entropy_nats]",
            definition=f"Mutual information of the factor and {target}{given}, from the counts as "
            "they are: biased upward, the more the more values there are.",
            source=SOURCE,
        ),
        Column(
            name="shuffled_nats",
            unit="nats",
            range="[0, entropy_nats]",
            definition="Chance: the same with shuffled values, mean over shuffles. Values of "
            "tokens are shuffled within their prompt, those of prompts over prompts (over units "
            "where each unit has one value); given the token, among its occurrences, or among the "
            "prompts it occurs in.",
        ),
        Column(
            name="entropy_nats",
            unit="nats",
            range="[0, ln 2]" if per_expert else "[0, ln E]",
            definition=f"H: entropy of {target}, over the counted tokens.",
        ),
    )
    return (*_BEFORE, *((EXPERT,) if per_expert else ()), *measures, *_NUMBERS)
