"""The story of refusal: find the experts, mask them, and see whether answers come back.

Experts that go with refusing are found and confirmed on the first half of the questions; masking
them is judged on the second half, beside other experts of the same layers. The model knows what it
refuses, so an answer is right or wrong, not just no refusal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moescope.app import console
from moescope.app.commands.demo import MAX_NEW_TOKENS, MODEL, RUN, DemoModel

if TYPE_CHECKING:
    from moescope.probe.analysis import AnalysisTable
    from moescope.probe.storage.store import Store
    from moescope.steering import SteeringPlan

NUM_MASKED: Final = 19  # 8 % of the experts, as in the page on the demo models
NUM_SHOWN: Final = 8
NUM_CONTROLS: Final = 2


def tell_refusal(model: DemoModel) -> None:
    """Find, steer and judge, each step shown as it is done."""
    table = _show_refusal_experts(model.store)
    _show_steering(model, table)


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


def _show_steering(model: DemoModel, table: AnalysisTable) -> None:
    """Mask those experts and judge the answers of the second half against random experts."""
    from moescope.app.commands.steer import select_prompts
    from moescope.steering.controls import with_bottom
    from moescope.steering.derive import plan_from_contrast
    from moescope.steering.evaluate import evaluate_plan
    from moescope.steering.evaluation_store import store_evaluation

    plan = plan_from_contrast(
        table.frame,
        num_mask=NUM_MASKED,
        layers=model.layers,
        name="less-refusal",
        model=MODEL,
        provenance={"run": RUN, "method": "risk_difference", **_group_sizes(table)},
    )
    plan = with_bottom(plan, model.layers, table.frame)
    plan_file = model.store_path.with_name("less-refusal.json")
    plan.write(plan_file)
    with console.progress("steering", "answers") as update:
        result = evaluate_plan(
            model.bundle,
            plan,
            select_prompts(["refusal"], ["half=second"]),
            num_controls=NUM_CONTROLS,
            max_new_tokens=MAX_NEW_TOKENS,
            judge_bundle=model.judge,
            progress=update,
        )
    store_evaluation(model.store_path, result)
    console.emit(f"Steering: {NUM_MASKED} experts masked; prompts of the second half only")
    console.emit(_known_truth(plan))
    for line in result.lines():
        console.emit(line)
    console.emit(
        f"The plan is in {plan_file}; the rates are in {model.store_path}, table evaluations\n"
    )


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
