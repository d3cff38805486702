"""The story of refusal: find the experts, mask them, and see whether answers come back.

Experts are found twice on the first half of the questions: by use (a contrast of refused against
answered prompts) and by cause (a search for a set whose removal ends the refusal). Masking each set
is judged on the second half, beside other experts of the same layers. The model knows what it
refuses, so an answer is right or wrong, not just no refusal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moescope.app import console
from moescope.app.commands.demo import MAX_NEW_TOKENS, MODEL, RUN, DemoModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from moescope.probe.analysis import AnalysisTable
    from moescope.probe.prompts import Prompt
    from moescope.probe.storage.store import Store
    from moescope.steering import SteeringPlan
    from moescope.steering.causes.asking import OwnAnswer
    from moescope.steering.causes.found import SearchedPlan
    from moescope.steering.evaluation import Condition

NUM_MASKED: Final = 19  # 8 % of the experts, as in the page on the demo models
NUM_SHOWN: Final = 8
NUM_CONTROLS: Final = 2
MAX_CAUSES: Final = 14
NUM_SEARCHED: Final = 40  # prompts of each kind that the search uses
NUM_EXACT: Final = 6


def tell_refusal(model: DemoModel) -> None:
    """Find, steer and judge, each step shown as it is done."""
    table = _show_refusal_experts(model.store)
    found = _show_causes(model, table.frame)
    unsteered = _show_steering(model, _plan_by_use(model, table), "by use")
    if found.plan is not None:
        _show_steering(model, found.plan, "by cause", unsteered)


def _show_refusal_experts(store: Store) -> AnalysisTable:
    """The experts that go with refusing, on the first half of the units."""
    from moescope.probe.analysis import Filters, expert_contrast

    filters = Filters(tokens="all", fields={"set_name": ("refusal",), "half": ("first",)})
    table = expert_contrast(
        store,
        RUN,
        a={"outcome": ("refused",)},
        b={"outcome": ("correct",)},
        filters=filters,
    )
    frame = table.frame
    console.emit(
        f"Refusal experts: {int(frame['confirmed'].sum())} of {len(frame)} confirmed "
        f"({frame['num_prompts_a'].iloc[0]} refused and {frame['num_prompts_b'].iloc[0]} answered "
        "prompts of the first half; risk difference found on one part, effect on the other)"
    )
    shown = frame[frame["confirmed"] & (frame["effect"] > 0)].head(NUM_SHOWN)
    columns = ["layer", "expert", "risk_difference", "effect", "low", "high", "q"]
    console.print_frame(shown[columns])
    console.emit("")
    return table


def _show_causes(model: DemoModel, contrast: pd.DataFrame) -> SearchedPlan:
    """A set of experts that causes the refusal, and what the contrast said of each."""
    from moescope.app.commands.steer import select_prompts
    from moescope.steering.causes.found import search_and_confirm

    prompts = select_prompts(["refusal"], ["half=first"])
    with console.progress("searching for causes", "experts") as update:
        found = search_and_confirm(
            model.bundle,
            [one for one in prompts if one.label == "sensitive"],
            [one for one in prompts if one.label == "neutral"],
            "opening", max_experts=MAX_CAUSES, most=NUM_SEARCHED, num_exact=NUM_EXACT,
            name="less-refusal-by-cause", known=_own_answers(model.store),
            told=lambda _, done, total: update(done, total),
        )  # fmt: skip
    console.emit("Causes: experts whose removal, one after the other, ends the refusal")
    for line in found.notes:
        console.emit(line)
    steps = found.found.frame()[["step", "layer", "expert", "change", "loss", "cost"]]
    beside = contrast[["layer", "expert", "risk_difference", "confirmed"]].rename(
        columns={"risk_difference": "used_more_by", "confirmed": "use_confirmed"}
    )
    console.print_frame(steps.merge(beside, on=["layer", "expert"], how="left"))
    if found.confirmed is not None:
        console.emit(found.confirmed.in_words())
    console.emit("")
    return found


def _own_answers(store: Store) -> Mapping[int, OwnAnswer]:
    """What the run recorded as the model's own answers, by the number of the prompt in its set."""
    from moescope.probe.prompts import read_prompts
    from moescope.steering.causes.asking import OwnAnswer

    rows = store.query(
        "SELECT key, response, outcome FROM prompts WHERE run_id = $run AND set_name = 'refusal'",
        {"run": RUN},
    )
    number = {one.key: one.prompt_id for one in read_prompts(["refusal"])}
    return {
        number[row["key"]]: OwnAnswer(row["response"], row["outcome"])
        for row in rows.to_dict("records")
    }


def _plan_by_use(model: DemoModel, table: AnalysisTable) -> SteeringPlan:
    """The experts of the contrast with the largest confirmed effects, masked."""
    from moescope.steering.controls import with_bottom
    from moescope.steering.derive import plan_from_contrast

    plan = plan_from_contrast(
        table.frame,
        num_mask=NUM_MASKED,
        layers=model.layers,
        name="less-refusal",
        model=MODEL,
        provenance={"run": RUN, "method": "risk_difference", **_group_sizes(table)},
    )
    return with_bottom(plan, model.layers, table.frame)


def _show_steering(
    model: DemoModel, plan: SteeringPlan, how: str, unsteered: Condition | None = None
) -> Condition:
    """Mask a plan's experts and judge the answers of the second half beside controls."""
    from moescope.steering.evaluate import evaluate_plan
    from moescope.steering.evaluation_store import store_evaluation

    plan_file = model.store_path.with_name(f"{plan.name}.json")
    plan.write(plan_file)
    with console.progress(f"steering {how}", "answers") as update:
        result = evaluate_plan(
            model.bundle, plan, _held_out(),
            num_controls=NUM_CONTROLS if unsteered is None else 1, unsteered=unsteered,
            max_new_tokens=MAX_NEW_TOKENS, judge_bundle=model.judge, progress=update,
        )  # fmt: skip
    store_evaluation(model.store_path, result)
    count = sum(len(one.experts) for one in plan.interventions)
    console.emit(
        f"Steering {how}: {count} experts masked; every other unit of the second half "
        "(moescope evaluate takes all)"
    )
    console.emit(_known_truth(plan))
    for line in result.lines():
        console.emit(line)
    console.emit(
        f"The plan is in {plan_file}; the rates are in {model.store_path}, table evaluations\n"
    )
    return result.conditions[0]


def _held_out() -> list[Prompt]:
    """Every other unit of the second half, with all its translations: half the time, as fair."""
    from moescope.app.commands.steer import select_prompts

    prompts = select_prompts(["refusal"], ["half=second"])
    units = sorted({one.pair_id or "" for one in prompts})[::2]
    return [one for one in prompts if one.pair_id in units]


def _known_truth(plan: SteeringPlan) -> str:
    """How many of the masked experts are among those that were tuned to refuse."""
    from moescope.probe.demo.models import tuned_experts

    tuned = {(layer, expert) for layer, ids in tuned_experts(MODEL).items() for expert in ids}
    masked = {(item.layer, expert) for item in plan.interventions for expert in item.experts}
    return (
        f"Known truth: {len(masked & tuned)} of them are among the {len(tuned)} experts that were "
        "tuned to refuse"
    )


def _group_sizes(table: AnalysisTable) -> dict[str, Any]:
    first = table.frame.iloc[0]
    return {"n_a": int(first["num_prompts_a"]), "n_b": int(first["num_prompts_b"])}
