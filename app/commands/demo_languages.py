"""The story of languages: does steering towards the pivot language help the weak ones?

How far each layer routes languages from English; which middle-layer experts English uses more than
the weak languages for the same questions; and what becomes of questions whose facts were never
taught in the language asked in, when those experts are made likelier (arXiv 2510.04694, soft). The
answer may be that nothing happens, and then that is what is shown.
"""

from __future__ import annotations

from typing import Any, Final

from moescope.app import console
from moescope.app.commands.demo import MAX_NEW_TOKENS, MODEL, RUN, DemoModel
from moescope.probe.storage.store import Store

WEAK: Final = ("ja", "zh", "el", "ru")
MIDDLE_LAYERS: Final = (1, 4)
TAU: Final = 0.1
STRENGTH: Final = 0.5
NUM_CONTROLS: Final = 1


def tell_languages(model: DemoModel) -> None:
    """Look, steer and judge, each step shown as it is done."""
    _show_divergence(model.store)
    _show_steering(model)


def _show_divergence(store: Store) -> None:
    """How far from English each layer routes the other languages, as a curve of bars."""
    from moescope.probe.analysis import Filters, language_divergence

    filters = Filters(tokens="prompt", fields={"set_name": ("parallel",)})
    table = language_divergence(store, RUN, filters=filters)
    frame = table.frame
    console.emit("Languages: how far each layer routes them from English")
    console.emit(
        f"(JSD of routing weights in nats, mean over {frame['lang'].nunique()} languages, "
        f"{frame['num_passages'].min()} passages each; excess: above the same language against "
        "itself at equal token counts)"
    )
    curve = frame.groupby("layer")[["jsd", "jsd_excess"]].mean()
    for layer, row in curve.iterrows():
        bar = "█" * round(40 * row["jsd"] / curve["jsd"].max())
        console.emit(
            f"  layer {layer:>2}  JSD {row['jsd']:.4f}  excess {row['jsd_excess']:+.4f}  {bar}"
        )
    console.emit("")


def _show_steering(model: DemoModel) -> None:
    """Make English's middle-layer experts likelier, and ask what was never taught in a language."""
    from moescope.app.commands.steer import select_prompts
    from moescope.probe.analysis import Filters, expert_contrast
    from moescope.steering.controls import with_bottom
    from moescope.steering.evaluate import evaluate_plan
    from moescope.steering.evaluation_store import store_evaluation
    from moescope.steering.strategies import make_plan

    table = expert_contrast(
        model.store, RUN, a={"lang": ("en",)}, b={"lang": WEAK}, average="unit",
        filters=Filters(tokens="prompt", fields={"set_name": ("parallel",)}),
    )  # fmt: skip
    plan = make_plan(
        "bandarkar-soft", table.frame, layers=model.layers, tau=TAU, strength=STRENGTH,
        layer_range=MIDDLE_LAYERS, name="towards-english", model=MODEL,
        provenance={"run": RUN, "method": "risk_difference"},
    )  # fmt: skip
    plan = with_bottom(plan, model.layers, table.frame)
    plan_file = model.store_path.with_name("towards-english.json")
    plan.write(plan_file)
    num_experts = sum(len(one.experts) for one in plan.interventions)
    first, last = MIDDLE_LAYERS
    console.emit(
        f"Steering towards English: {num_experts} experts of layers {first} to {last} made "
        f"likelier by {STRENGTH:g} standard deviations; {', '.join(WEAK)}; `crosslingual`: facts "
        "never taught in the language asked in"
    )
    prompts = select_prompts(["crosslingual", "neutral"], [f"lang={','.join(WEAK)}"])
    settings: dict[str, Any] = {"group_by": "set_name", "behavior": "correct"}
    with console.progress("steering", "answers") as update:
        result = evaluate_plan(
            model.bundle, plan, prompts, num_controls=NUM_CONTROLS, judge_bundle=model.judge,
            max_new_tokens=MAX_NEW_TOKENS, progress=update, **settings,
        )  # fmt: skip
    store_evaluation(model.store_path, result)
    for line in result.lines():
        console.emit(line)
    console.emit(f"The plan is in {plan_file}\n")
