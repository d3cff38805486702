"""Page: the live model under a plan: one prompt side by side, or many with their rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, experts, layout, live, plans, prompt_rows, sweeps

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.prompts import Prompt
    from moescope.steering import SteeringPlan
    from moescope.steering.evaluation import EvaluationResult
    from moescope.steering.generate import ComparedAnswer, Comparison

_FROM_RUN: Final = "recorded"
_TYPED: Final = "your own"
_ANSWERS: Final = "_answers"
_EVALUATION: Final = "_evaluation"


def show() -> None:
    """Draw the page."""
    layout.heading(
        "Steering",
        "What does the model answer when its routing is changed, and do random experts do as much?",
    )
    run = state.shown_run()
    plan = _choose_plan(run)
    names = ["One prompt", "Many prompts", "Sweeps"]
    one, many, doses = st.tabs(names, key="view", bind="query-params")
    if one.open:
        with one:
            _ask_one(run, plan)
    if many.open:
        with many:
            _ask_many(run, plan)
    if doses.open:
        with doses:
            sweeps.show_sweeps()
    state.import_ahead(*live.MODEL)


def _choose_plan(run: state.ShownRun) -> SteeringPlan | None:
    """The plan at hand; from the refusal page, a file, or none."""
    plan = state.kept_plan()
    about, upload, drop = st.columns([6, 1.4, 1.2])
    with upload, st.popover("Upload plan", icon=":material/upload:", width="stretch"):
        plans.upload_plan()
        plan = state.kept_plan()
    if plan is None:
        about.info(
            "No plan is at hand, so answers are unsteered: make one on the page Refusal experts, "
            "or upload a plan file."
        )
        if drop.button("Make one", width="stretch"):
            st.switch_page("views/refusal.py")
        return None
    drop.button("Drop plan", on_click=state.drop_plan, width="stretch")
    with about, st.expander(f"Plan: {layout.escaped(plan.title)}", icon=":material/tune:"):
        plans.show_plan(plan, key="at_hand")
    if plan.model is not None and plan.model != run.info.model:
        st.warning(
            layout.escaped(
                f"The plan was made for {plan.model}, and this run is of {run.info.model}: expert "
                "numbers of one model mean nothing in another."
            )
        )
    return plan


def _ask_one(run: state.ShownRun, plan: SteeringPlan | None) -> None:
    prompt, longest, seed = _choose_prompt(run)
    asked = st.button(
        "Answer", type="primary", icon=":material/play_arrow:", disabled=prompt is None
    )
    if prompt is None:
        return
    key = (run.store, run.run_id, prompt.text, plan and plan.plan_id, longest, seed)
    if asked:
        doing = "Answering …" if live.is_loaded(run) else f"Loading {run.info.model} …"
        with st.spinner(doing, show_time=True):
            found = live.answer(run, prompt, plan, max_new_tokens=longest, control_seed=seed)
        st.session_state[_ANSWERS] = (key, found)
    kept_key, answers = st.session_state.get(_ANSWERS, (None, None))
    if answers is None or kept_key != key:
        st.caption(
            f"Press Answer: {layout.escaped(run.info.model)} answers greedily"
            + (" without the plan, with it, and with random experts." if plan else ".")
        )
        return
    _show_answers(answers, seed)
    if prompt.set_name != _TYPED:
        unsteered = {prompt.prompt_id: answers.compared.answers[0].unsteered.text}
        _warn_of_other_answers(run, unsteered, longest)


def _warn_of_other_answers(run: state.ShownRun, unsteered: Mapping[int, str], longest: int) -> None:
    """A plan made from recorded routing says little about a model that answers otherwise now."""
    changed = state.num_answered_otherwise(run, unsteered, longest)
    if changed:
        st.warning(
            f"{changed:,} of {len(unsteered):,} unsteered answers differ from those that the run "
            "recorded: the model's weights, precision or software are not what they were, and "
            "experts found in the run may not be those of this model. Record the run again.",
            icon=":material/history:",
        )


def _choose_prompt(run: state.ShownRun) -> tuple[Prompt | None, int, int]:
    """The prompt to ask, the longest answer in tokens, the seed of the random experts."""
    source_column, prompt_column, longest_column, seed_column = st.columns(
        [1.6, 5, 1.2, 1.2], vertical_alignment="bottom"
    )
    with source_column:
        source = choices.linked_choice("Prompt", [_FROM_RUN, _TYPED], key="source")
    with longest_column:
        usual = state.longest_answer(run)
        longest = st.number_input("Longest answer", 1, 4096, usual, help="In tokens.")
    with seed_column:
        seed = st.number_input("Control seed", 0, 10_000, 0, help="Draws the random experts.")
    with prompt_column:
        if source == _FROM_RUN:
            return _prompt_of_run(run), int(longest), int(seed)
        text = st.text_area("Text", key="typed", height=80, persist_state="session").strip()
    if not text:
        return None, int(longest), int(seed)
    from moescope.probe.prompts import Prompt

    return Prompt(prompt_id=0, text=text, set_name=_TYPED), int(longest), int(seed)


def _prompt_of_run(run: state.ShownRun) -> Prompt:
    frame = state.prompts(run).set_index("prompt_id", drop=False)
    refused = frame.index[frame["outcome"] == "refused"].tolist()
    chosen = choices.linked_choice(
        f"One of {len(frame):,}",
        frame.index.tolist(),
        key="prompt",
        default=refused[0] if refused else None,
        words=lambda prompt_id: choices.prompt_in_a_line(frame.loc[prompt_id]),
    )
    return live.prompt_of(frame.loc[chosen])


def _show_answers(answers: live.Answers, seed: int) -> None:
    compared, control = answers.compared, answers.control
    one = compared.answers[0]
    boxes: list[tuple[str, str, str | None]] = [
        ("Unsteered", one.unsteered.text, one.unsteered_outcome.outcome)
    ]
    if one.steered is not None and one.steered_outcome is not None:
        boxes.append(("Steered", one.steered.text, one.steered_outcome.outcome))
    if control is not None:
        boxes.append((f"Random experts, seed {seed}", *_steered(control.answers[0])))
    for column, (label, text, outcome) in zip(st.columns(len(boxes)), boxes, strict=True):
        with column, st.container(border=True, height="stretch"):
            experts.show_outcome(label, outcome)
            st.text(text or "(empty)")
    if one.prompt.expected is not None:
        st.caption(f"Known right answer: {layout.escaped(one.prompt.expected)}")
    if control is None:
        return
    st.caption(
        "Random experts: as many others in the same layers. Where they change the answer as much, "
        "the plan's own experts have shown nothing; one prompt shows little either way."
    )
    _show_routing("Steered", compared)
    _show_routing("Random experts", control)
    with st.expander("Requested and achieved routing, by intervention"):
        assert compared.report is not None
        layout.show_frame(compared.report.frame(), key="achieved", name="achieved-routing")


def _steered(answer: ComparedAnswer) -> tuple[str, str | None]:
    text = "" if answer.steered is None else answer.steered.text
    return text, None if answer.steered_outcome is None else answer.steered_outcome.outcome


def _show_routing(label: str, comparison: Comparison) -> None:
    from moescope.steering.generate import achieved_in_words

    if comparison.report is not None:
        st.markdown(f"**{label}**, routing: {achieved_in_words(comparison.report)}.")


def _ask_many(run: state.ShownRun, plan: SteeringPlan | None) -> None:
    if plan is None:
        st.info("An evaluation needs a plan: make one on the page Refusal experts, or upload one.")
        return
    found, kept, neutral_label, controls = _choose_many(run)
    if not state.is_held_out(plan, run, kept):
        st.caption(
            ":material/warning: The plan was made from this run, so some of these prompts chose "
            "its experts, and the rates flatter it. For a claim, keep some prompts apart: filter "
            "on the page Refusal experts (such as `half` = first), and filter the others here."
        )
    asked = st.button(
        f"Evaluate on {len(found):,} prompts", type="primary", icon=":material/play_arrow:",
        disabled=found.empty,
    )  # fmt: skip
    key = (run.store, run.run_id, plan.plan_id, tuple(found["prompt_id"]), neutral_label, controls)
    if asked:
        evaluated = _evaluate(run, plan, found, neutral_label, controls)
        st.session_state[_EVALUATION] = (key, evaluated)
    kept_key, evaluated = st.session_state.get(_EVALUATION, (None, None))
    if evaluated is not None and kept_key == key:
        _show_evaluation(run, evaluated)


def _choose_many(
    run: state.ShownRun,
) -> tuple[pd.DataFrame, dict[str, tuple[str, ...]], str, int]:
    """The prompts to evaluate on and their filter, the neutral label, the seeds of controls."""
    frame = state.prompts(run)
    fields = state.comparable_fields(run)
    filter_column, number_column, neutral_column, controls_column = st.columns(
        [1.3, 1.3, 1.6, 1.3], vertical_alignment="bottom"
    )
    with filter_column:
        kept = choices.conditions(fields, key="evaluate")
    candidates = prompt_rows.matching_prompts(frame, "", kept)
    if not kept and candidates["label"].notna().any():
        candidates = candidates[candidates["label"].notna()]
    most = max(len(candidates), 1)
    with number_column:
        number = st.number_input(
            "Prompts per label", 1, most, min(30, most), key="num_prompts",
            help=f"Drawn from {len(candidates):,}, what shares a pair_id together, with seed 0; "
            "more prompts make narrower intervals.",
        )  # fmt: skip
    labels = fields.get("label") or ["neutral"]
    with neutral_column:
        neutral = choices.linked_choice(
            "Neutral label", labels, key="neutral", default="neutral",
            help="Prompts that the plan should leave alone: side effects are measured on these.",
        )  # fmt: skip
    with controls_column:
        controls = st.number_input(
            "Seeds of controls", 1, 20, 2, key="controls",
            help="Each draws a control of random experts and one of experts of similar load, in "
            "the layers and numbers of the plan. The bottom of the plan's ranking is one more.",
        )  # fmt: skip
    return prompt_rows.sampled_prompts(candidates, int(number), 0), kept, neutral, int(controls)


def _evaluate(
    run: state.ShownRun, plan: SteeringPlan, found: pd.DataFrame, neutral: str, controls: int
) -> live.Evaluated:
    bar = st.progress(0.0, f"Loading {run.info.model} …")

    def progress(done: int, total: int) -> None:
        bar.progress(done / total, f"{done:,} of {total:,} answers")

    try:
        return live.evaluate(
            run, plan, found, neutral_label=neutral, num_controls=controls, progress=progress
        )
    finally:
        bar.empty()


def _show_evaluation(run: state.ShownRun, evaluated: live.Evaluated) -> None:
    from moescope.steering.outcome_chart import outcome_chart

    result = evaluated.result
    layout.show_figure(
        outcome_chart(result, run.run_id),
        key="outcomes",
        alt="Share of each outcome by group of prompts: unsteered, steered, controls",
    )
    unsteered = [answer.text for answer in result.conditions[0].answers]
    asked = dict(zip(evaluated.prompt_ids, unsteered, strict=True))
    _warn_of_other_answers(run, asked, state.longest_answer(run))
    for verdict in result.verdicts():
        show = st.success if verdict.is_confirmed else st.warning
        show(layout.escaped(verdict.in_words()))
    for note in result.notes:
        st.caption(f":material/info: {layout.escaped(note)}")
    if evaluated.left_out:
        st.caption(
            f":material/info: {evaluated.left_out} prompts with earlier turns were left out: the "
            "store keeps their last message alone, so they cannot be asked again as they were."
        )
    rates, changed, routing = st.tabs(["Rates", "Changed answers", "Routing"])
    with rates:
        st.caption(
            "Wilson intervals take prompts as independent; the rows named _change are paired "
            "differences to the unsteered answers, resampled by pair. kl is KL(unsteered to "
            "steered) in nats on neutral prompts."
        )
        layout.show_frame(result.frame, key="rates", name="evaluation", height=420)
        _offer_keeping(result)
    with changed:
        layout.show_frame(_changed(result), key="changed", name="changed-answers", height=420)
    with routing:
        _show_conditions(result)


def _offer_keeping(result: EvaluationResult) -> None:
    """Put the rows into the store, when asked to."""
    if st.button("Keep in the store", icon=":material/save:", key="keep_evaluation"):
        from moescope.steering.evaluation_store import store_evaluation

        with st.spinner("Waiting for the store …"):
            store_evaluation(state.store_path(), result)
        st.success(f"Evaluation {result.evaluation_id} is in the tables plans and evaluations.")


def _changed(result: EvaluationResult) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = [dataclasses.asdict(one) for one in result.examples]
    return pd.DataFrame(rows, columns=[one.name for one in dataclasses.fields(_row_type())])


def _row_type() -> Any:
    from moescope.steering.evaluation import ChangedAnswer

    return ChangedAnswer


def _show_conditions(result: EvaluationResult) -> None:
    from moescope.steering.condition_names import condition_in_words
    from moescope.steering.generate import achieved_in_words

    for condition in result.conditions:
        if condition.report is not None:
            name = layout.escaped(condition_in_words(condition.name))
            st.markdown(f"**{name}**: {achieved_in_words(condition.report)}.")


if __name__ == "__main__":
    show()
