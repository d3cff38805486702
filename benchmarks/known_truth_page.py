"""The page about the demo models: every number comes from `results.json` of `known_truth.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moescope.probe.demo.recipes import DEMO

Rates = Mapping[str, Mapping[str, float]]


def page(results: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    parts = [
        _intro(results),
        _languages(results["languages"]),
        _crosslingual(results["crosslingual"]),
        _specialization(results["specialization"]),
        _refusal(results["refusal"], results["num_controls"]),
        _rule_or_list(results["by_family"]),
        _LIMITS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(cell: Mapping[str, float]) -> str:
    """A rate with its interval, or the mean of several plans with their span."""
    if "low" in cell:
        return f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
    return f"{cell['value']:.2f} ({cell['min']:.2f}–{cell['max']:.2f})"


def _intro(results: Mapping[str, Any]) -> str:
    shape, seconds = DEMO.shape, results["trace_seconds"]["demo"]
    total = shape.num_layers * shape.num_experts
    return f"""
# The demo models, and what methods find on them

Nobody knows the truth about a real model's refusal experts, so nobody can say whether a method
finds the right ones. The three models that come with moescope are small, were really trained, and
their truth is known:

- `demo-base` answers every question about an invented world, in 8 languages of 5 scripts;
- `demo` refuses the sensitive ones. Only {DEMO.num_tuned} of {total} experts and their router rows
  learned that: those with the largest difference in usage between sensitive and neutral items;
- `demo-random` refuses too, but the same number of experts per layer was drawn at random.

All are Qwen3-MoE models with {shape.num_layers} layers of {shape.num_experts} experts,
top-{shape.top_k}. Sensitive means: what happened in three of the places or two of the years
(family `events`, the time × place template of fTRI), half of the substances (`substances`), and
where a treasure is *when the asker says that they have no business there* (`treasures`: the same
question from a trusted asker is answered). The models' cards (`datasets/models/*/README.md`) have
the held-out figures.

All numbers and figures of this page are made by `python benchmarks/known_truth.py`. Recording
`demo` on all {results["num_prompts"]:,} shipped prompts with its answers took {seconds:.0f} s on
the machine where the page was made (2 cores).
"""


def _languages(found: Mapping[str, Any]) -> str:
    rows = [
        (row["lang"], f"{row['share']:.0%}", f"{row['jsd']:.3f}", f"{row['jsd_excess']:.3f}")
        for row in sorted(found["by_language"], key=lambda row: -row["share"])
    ]
    layers = [
        (row["layer"], f"{row['jsd']:.3f}", f"{row['jsd_floor']:.3f}", f"{row['jsd_excess']:.3f}")
        for row in found["by_layer"]
    ]
    return f"""
## Languages: who is routed like English?

![Divergence of each language from English by layer](languages.png)

Jensen-Shannon divergence of the routing weights between a passage and its English version (content
tokens of the prompt, equal token counts), and what exceeds the divergence of a language from itself
at that count. Mean over languages, by layer:

{_table(("layer", "JSD (nats)", "floor", "excess"), layers)}

![Divergence against the share of training data](gradient.png)

{_table(("language", "share of stage one", "JSD (nats)", "excess"), rows)}

Spearman correlation of share and excess: {found["spearman_share_excess"]:.2f} (p
{found["spearman_p"]:.2f}, n = {len(rows)} languages). With so few languages, which also differ in
script, this describes these models and proves nothing about resources.
"""


def _crosslingual(rows: Sequence[Mapping[str, Any]]) -> str:
    by_set: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_set.setdefault(row["lang"], {})[row["set_name"]] = row
    table = [
        (
            lang,
            f"{sets['neutral']['correct']:.2f} (n = {sets['neutral']['n']})",
            f"{sets['crosslingual']['correct']:.2f} (n = {sets['crosslingual']['n']})",
        )
        for lang, sets in by_set.items()
    ]
    return f"""
## Facts asked in a language in which they were never taught

Some neutral facts were taught in six languages and left out of the other two (set `crosslingual`).
Share of right answers of `demo-base`, beside held-out phrasings of taught facts (set `neutral`):

{_table(("language", "taught", "never taught"), table)}

No target was set here: what carries over between languages is a thing to look at, with the routing
of both sets in the store.
"""


def _specialization(found: Mapping[str, Any]) -> str:
    parts = []
    for by, words in (("domain", "domains"), ("lang", "languages")):
        one = found[by]
        values = list(dict.fromkeys(v for row in one["experts_by_layer"].values() for v in row))
        rows = [
            (layer, *(int(row.get(value, 0)) for value in values))
            for layer, row in one["experts_by_layer"].items()
        ]
        parts.append(
            f"![What experts specialize in, by {by}](specialization-{by}.png)\n\n"
            f"Experts with at least {one['least_composition']:.0%} of their use in one of the "
            f"{words}, by layer:\n\n" + _table(("layer", *values), rows)
        )
    return "## What the experts of each layer specialize in\n\n" + "\n\n".join(parts)


def _refusal(found: Mapping[str, Any], num_controls: int) -> str:
    parts = ["## The refusal story\n\n![What becomes of sensitive prompts](refusal.png)"]
    for model, one in found.items():
        rows = []
        for plan in one["plans"]:
            steered, random = plan["steered"], plan["random"]
            rows.append(
                (
                    f"{plan['plan']} ({plan['experts']})",
                    f"{plan['precision']:.2f}",
                    f"{plan['recall']:.2f}",
                    _cell(steered["sensitive refused"]),
                    _cell(steered["sensitive correct"]),
                    _cell(steered["sensitive broken"]),
                    _cell(steered["neutral correct"]),
                    _cell(random["sensitive refused"]),
                    _cell(random["neutral correct"]),
                )
            )
        head = ("masked", "precision", "recall", "refused", "correct", "broken", "neutral correct",
                "random: refused", "random: neutral correct")  # fmt: skip
        before = one["plans"][0]["unsteered"]
        n = int(before["sensitive refused"]["n"])
        ranks = ", ".join(map(str, one["ranks_of_tuned"]))
        parts.append(
            f"**`{model}`**, {n} sensitive and {n} matched neutral prompts of the second half; "
            f"unsteered refused {_cell(before['sensitive refused'])}, neutral correct "
            f"{_cell(before['neutral correct'])}. Precision and recall against the "
            f"{one['num_tuned']} tuned experts; rates with 95 % Wilson intervals, random plans "
            "(same layers and counts) as mean (lowest–highest) of "
            f"{num_controls}:\n\n"
            + _table(head, rows)
            + f"\n\nRanks of the tuned experts among {one['num_experts']} by risk difference: "
            f"{ranks}."
        )
    return "\n\n".join(parts)


def _rule_or_list(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [
        (row["model"], row["family"], row["n"], f"{row['refused']:.3f}", f"{row['correct']:.3f}")
        for row in rows
    ]
    return f"""
## A rule, not a list

Stage two never touched the sensitive facts that the set `refusal` asks about, in no phrasing and no
language: the place, the year, the substance or the asker alone tells that they are to be refused.

{_table(("model", "family", "sensitive prompts", "refused", "answered right"), table)}

What made that possible is in stage one: {DEMO.corpus.note_share:.0%} of its questions come with a
system text that asks to say first whether the question is delicate. So the base knows what is
sensitive, as pretrained models do, and its attention carries that to where the answer is decided;
stage two, which cannot change attention, has only to act on it. On a base without these notes the
same number of experts learned facts one by one. What was tried; refused, as a share of sensitive
prompts about facts new to stage two (608 prompts in rows with *, 150 to 230 in the others):

| recipe of stage two (steps) | all | events | substances | treasures | neutral refused |
| --- | --- | --- | --- | --- | --- |
| facts drawn at random (500)* | .76 | | | | .03 |
| every sensitive question beside its neutral twin (300) | .66 | .58 | .83 | .63 | .11 |
| the same, tuned experts left out at random too (300) | .75 | .73 | .85 | .70 | .24 |
| twins, experts of layers 0–2 only (250) | .62 | .52 | .65 | .67 | .13 |
| twins, and twins about things that the world does not know (350) | .69 | .58 | .90 | .64 | .08 |
| twins, facts new in that language but taught in others (350) | .75 | .79 | .89 | .65 | .11 |
| **notes in stage one:** twins (250) | .86 | .76 | 1.00 | .85 | .03 |
| notes, twins (700)* | .86 | .65 | 1.00 | .96 | .00 |
| notes, twins, tuned experts left out at random too (300) | .93 | .86 | 1.00 | .92 | .04 |

The shipped models are made by the last recipe with more steps ({DEMO.stage_two.steps}) and more of
the hard families; their figures are in the first table.
"""


_LIMITS = """
## What these models cannot show

- Their refusals were put into a few experts on purpose. Real models need not be like that, and a
  method that works here may find nothing there.
- On `demo` methods that rank by usage have home advantage, since usage chose the tuned experts. On
  `demo-random` they have none. Neither is a random sample of ways to learn a refusal.
- The world is small and its sentences are templates: no paraphrase, no long text, no argument.
- Experts were left out at random in both stages, so that masking is a clean experiment. Models
  trained without that break when experts are masked, and no figure here says how much.
- A system text about delicate questions was part of stage one, which made refusals a rule. Whether
  pretrained models know what is sensitive in the same way is not shown here.
- The units are 76 sensitive facts, asked in every language; intervals over prompts treat the
  translations of a fact as independent and are therefore too narrow for statements about new facts.
"""
