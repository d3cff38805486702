"""lm-evaluation-harness on a steered model, against this repository's own scores and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope.probe.errors import PlanError
from moescope.probe.models import ModelBundle, load_model
from moescope.probe.prompts import Prompt, read_prompts
from moescope.probe.rendering import render_prompt
from moescope.probe.storage.store import Store
from moescope.steering import SteeringPlan, steer
from moescope.steering.generate import Asker, proved_sites
from moescope.steering.harness_prompts import write_prompt_tasks
from moescope.steering.harness_tasks import HarnessTasks, check_tasks, load_tasks, require_harness
from moescope.steering.positions import answers_begin_at
from moescope.steering.rates import mean_over_units
from moescope.steering.scoring import score_choices

pytest.importorskip("lm_eval", reason="needs the extra: pip install 'moescope[lm-eval]'")

from moescope.steering.harness_model import SteerableHFLM
from moescope.steering.harness_run import HarnessResult, run_tasks
from moescope.steering.harness_store import store_tasks

SCOPES: list[Any] = ["all", "prompt", "generated", "last_prompt", {"first_generated": 2}]
#: Contexts and continuations of unequal length; two end in white space, two feed the same tokens.
REQUESTS = [
    ("Is it?", " Yes, and this is a much longer answer"),
    ("What happened in the year 1911 in the town of Aldora?", " no"),
    ("<|user|>\nWhy?<|end|>\n<|assistant|>\n", "ünï"),
    ("It ended  ", "here"),
    ("A B", " C D"),
    ("A B C", " D"),
]


def plan_on(tokens: Any, num_layers: int = 3) -> SteeringPlan:
    return SteeringPlan(
        name="masked",
        interventions=[
            {"action": "mask", "layer": layer, "experts": [0, 1, 2], "tokens": tokens}
            for layer in range(num_layers)
        ],
    )


def by_hand(bundle: ModelBundle, context: str, continuation: str) -> float:
    """Log-likelihood of an answer, white space before it included, by a forward without padding."""
    ids = bundle.tokenizer.encode(context + continuation)
    begin = len(bundle.tokenizer.encode(context.rstrip()))
    with torch.inference_mode(), answers_begin_at(len(bundle.tokenizer.encode(context))):
        logits = bundle.model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits
    log_probs = logits[0].log_softmax(-1)
    return sum(float(log_probs[at - 1, ids[at]]) for at in range(begin, len(ids)))


def asked(lm: Any, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return list(
        getattr(lm, kind)(
            [Instance(kind, {}, one, at) for at, one in enumerate(arguments)], disable_tqdm=True
        )
    )


@pytest.mark.parametrize("tokens", SCOPES, ids=str)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_forwards_without_padding(
    tiny_bundle: Any, tokens: Any, batch_size: int
) -> None:
    lm = SteerableHFLM(tiny_bundle, batch_size=batch_size)
    before = [by_hand(tiny_bundle, *one) for one in REQUESTS]
    with steer(tiny_bundle.model, plan_on(tokens)):
        expected = [by_hand(tiny_bundle, *one) for one in REQUESTS]
        found = [total for total, _ in asked(lm, "loglikelihood", REQUESTS)]
    assert found == pytest.approx(expected, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(found, before, strict=True)) > 0.05


def test_unsteered_numbers_are_those_of_the_harness_itself(tiny_bundle: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    own = HFLM(pretrained=tiny_bundle.model, tokenizer=tiny_bundle.tokenizer, batch_size=4)
    ours = SteerableHFLM(tiny_bundle, batch_size=4)
    # Not the two that feed the same tokens: the harness scores the second by the first's logits.
    requests = REQUESTS[:-1]
    expected = [total for total, _ in asked(own, "loglikelihood", requests)]
    found = [total for total, _ in asked(ours, "loglikelihood", requests)]
    assert found == pytest.approx(expected, abs=1e-3)
    texts = [(text,) for text, _ in REQUESTS]
    expected = asked(own, "loglikelihood_rolling", texts)
    assert asked(ours, "loglikelihood_rolling", texts) == pytest.approx(expected, abs=1e-3)


def test_whole_texts_are_steered_in_every_window(tiny_bundle: Any) -> None:
    texts = ["A short one.", "A text of two windows. " * 3]
    lm = SteerableHFLM(tiny_bundle, batch_size=3)
    lm._max_length = 40  # the harness' own way to shorten windows
    tokenizer = tiny_bundle.tokenizer
    with steer(tiny_bundle.model, plan_on("all")) as report:
        found = asked(lm, "loglikelihood_rolling", [(text,) for text in texts])
        whole = [tokenizer.eos_token_id, *tokenizer.encode(texts[0])]
        with torch.inference_mode():
            inputs = torch.tensor([whole[:-1]])
            logits = tiny_bundle.model(input_ids=inputs, use_cache=False).logits
    log_probs = logits[0].log_softmax(-1)
    assert found[0] == pytest.approx(
        sum(float(log_probs[at, token]) for at, token in enumerate(whole[1:])), abs=1e-3
    )
    assert report.share == 1


def test_padding_is_not_counted_as_steered(tiny_bundle: Any) -> None:
    lm = SteerableHFLM(tiny_bundle, batch_size=8)
    with steer(tiny_bundle.model, plan_on("all")) as report:
        asked(lm, "loglikelihood", REQUESTS)
    encode = tiny_bundle.tokenizer.encode
    num_fed = sum(len(encode(one + two)) - 1 for one, two in REQUESTS)
    assert {row.requested for row in report.rows} == {3 * num_fed}


@given(
    context=st.lists(st.integers(1, 250), min_size=1, max_size=30),
    answer=st.lists(st.integers(1, 250), min_size=1, max_size=10),
    max_length=st.integers(10, 40),
)
def test_the_answer_begins_behind_the_cut(
    tiny_lm: Any, context: list[int], answer: list[int], max_length: int
) -> None:
    tiny_lm._max_length = max_length
    row = tiny_lm.fed_row((None, context, answer))
    assert list(row.token_ids) == (context + answer)[:-1][-max_length:]
    # All answer tokens but the last are fed, unless the cut reaches into the answer.
    assert row.answer_column == max(len(row.token_ids) - (len(answer) - 1), 0)


@pytest.fixture(scope="module")
def tiny_lm(tiny_bundle: Any) -> Any:
    return SteerableHFLM(tiny_bundle)


def english(num_pairs: int) -> list[Prompt]:
    found = [one for one in read_prompts(["refusal"]) if one.lang == "en"]
    return found[: 2 * num_pairs]


@pytest.fixture(scope="module")
def demo() -> ModelBundle:
    return load_model("demo")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> HarnessTasks:
    folder = tmp_path_factory.mktemp("tasks")
    return load_tasks(write_prompt_tasks(english(4), folder, max_new_tokens=16), [folder])


@pytest.fixture(scope="module")
def result(demo: ModelBundle, tasks: HarnessTasks) -> HarnessResult:
    return run_tasks(demo, tasks, demo_plan(), num_controls=1, batch_size=5)


def demo_plan() -> SteeringPlan:
    from moescope.probe.shipped import shipped_path

    tuned = json.loads(shipped_path("models", "demo", "tuned_experts.json").read_text())
    return SteeringPlan(
        name="tuned experts",
        interventions=[
            {"action": "mask", "layer": int(layer), "experts": experts, "tokens": "generated"}
            if layer == "0"
            else {"action": "mask", "layer": int(layer), "experts": experts}
            for layer, experts in tuned["experts"].items()
        ],
    )


@pytest.mark.parametrize("at", [0, 1], ids=["unsteered", "steered"])
def test_choices_score_as_our_own_prompt_by_prompt(
    demo: ModelBundle, result: HarnessResult, at: int
) -> None:
    condition = result.conditions[at]
    for label in ("neutral", "sensitive"):
        samples = condition.results["samples"][f"refusal_{label}_choice"]
        by_key = {prompt.key: prompt for prompt in english(4)}
        prompts = [by_key[one["doc"]["id"]] for one in samples]
        choices = [one["doc"]["choices"] for one in samples]
        if condition.plan is None:
            own = score_choices(demo, prompts, choices)
        else:
            with steer(demo.model, condition.plan):
                own = score_choices(demo, prompts, choices)
        for one, score in zip(samples, own, strict=True):
            assert [total for total, _ in one["filtered_resps"]] == pytest.approx(
                score.totals, abs=1e-4
            )
        right = [one["doc"]["right"] for one in samples]
        accuracy = sum(
            score.best_by_total == wanted for score, wanted in zip(own, right, strict=True)
        ) / len(right)
        assert score_of(result, f"refusal_{label}_choice", "acc", condition.name) == accuracy


def score_of(result: HarnessResult, task: str, metric: str, condition: str) -> float:
    frame = result.frame.set_index(["task", "metric", "condition"])
    return float(frame.loc[(task, metric, condition), "value"])  # type: ignore[arg-type,index]


@pytest.mark.parametrize("at", [0, 1], ids=["unsteered", "steered"])
def test_answers_are_those_of_our_own_generation(
    demo: ModelBundle, result: HarnessResult, at: int
) -> None:
    rendered = [render_prompt(demo.tokenizer, prompt) for prompt in english(4)]
    asker = Asker(
        demo, rendered, proved_sites(demo, rendered), max_new_tokens=16, tokens_per_batch=200,
        num_rounds=1, progress=None,
    )  # fmt: skip
    answers, _ = asker.ask(result.conditions[at].plan)
    own = {prompt.key: one.text for prompt, one in zip(english(4), answers, strict=True)}
    for label in ("neutral", "sensitive"):
        for one in result.conditions[at].results["samples"][f"refusal_{label}_answer"]:
            assert one["filtered_resps"][0].strip() == own[one["doc"]["id"]]


def test_a_plan_that_lifts_refusals_shows_where_its_control_does_not(
    result: HarnessResult,
) -> None:
    names = [one.name for one in result.conditions]
    assert names == ["unsteered", "steered", "control:random:0"]
    scores = [score_of(result, "refusal_sensitive_answer", "exact_match", one) for one in names]
    assert scores[0] < 0.5 < scores[1]
    assert scores[2] < 0.5
    assert any("100.0%" in line for line in result.lines())
    reports = [one.report for one in result.conditions]
    assert reports[0] is None
    assert [one.share for one in reports if one is not None] == [1.0, 1.0]


def test_changes_are_paired_over_the_units_of_the_documents(result: HarnessResult) -> None:
    before, after = (
        one.results["samples"]["refusal_sensitive_answer"] for one in result.conditions[:2]
    )
    changes = [
        two["exact_match"] - one["exact_match"] for one, two in zip(before, after, strict=True)
    ]
    units = [f"pair {one['doc']['pair_id']}" for one in before]
    frame = result.frame.set_index(["task", "metric", "condition"])
    row = frame.loc[("refusal_sensitive_answer", "exact_match", "steered")]
    assert (row["change"], row["change_low"], row["change_high"]) == pytest.approx(
        mean_over_units(changes, units, 0)
    )
    assert row["n"] == 4
    numbers = result.conditions[1].results["results"]["refusal_sensitive_answer"]
    assert row["stderr"] == numbers["exact_match_stderr,none"]
    unsteered = result.frame[result.frame["condition"] == "unsteered"]
    assert unsteered["change"].isna().all()


def test_rows_are_stored_with_plans_and_standard_errors(
    result: HarnessResult, tmp_path: Path
) -> None:
    path = tmp_path / "s.duckdb"
    store_tasks(path, result)
    rows = Store(path).query("SELECT * FROM evaluations")
    assert set(rows["evaluation_id"]) == {result.evaluation_id}
    assert set(rows["plan_id"].dropna()) == {
        one.plan.plan_id for one in result.conditions if one.plan is not None
    }
    chosen = rows[
        (rows["set_name"] == "refusal_sensitive_answer") & (rows["condition"] == "steered")
    ]
    values = chosen.set_index("metric")
    assert set(values.index) == {"exact_match", "exact_match_change"}
    frame = result.frame.set_index(["task", "metric", "condition"])
    own = frame.loc[("refusal_sensitive_answer", "exact_match", "steered")]
    assert values.loc["exact_match", "value"] == own["value"]
    assert values.loc["exact_match_change", "low"] == own["change_low"]
    details = json.loads(str(values.loc["exact_match", "details"]))
    assert details["stderr"] == own["stderr"]
    assert (details["group"], details["seed"], details["harness_seed"]) == ("all", 0, 1234)
    assert details["harness"] == f"lm_eval {require_harness()}"
    assert set(rows[rows["metric"] == "achieved"]["value"]) == {1.0}
    assert len(Store(path).query("SELECT * FROM plans")) == 2


@pytest.fixture(scope="module")
def whole_texts(tmp_path_factory: pytest.TempPathFactory) -> HarnessTasks:
    """A task of one's own that scores whole texts, and needs no network."""
    folder = tmp_path_factory.mktemp("own")
    texts = ["One text.", "Another, longer text.", "And a third."]
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "texts.yaml").write_text(
        f"""task: own_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / "cache"}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
    )
    return load_tasks(["own_texts"], [folder])


def test_a_score_that_is_no_mean_has_a_change_without_interval(
    tiny_bundle: Any, whole_texts: HarnessTasks
) -> None:
    found = run_tasks(
        tiny_bundle, whole_texts, plan_on("all"), num_controls=0, limit=2, chat_template="off",
        bootstrap_iters=20,
    )  # fmt: skip
    before, after = found.frame.to_dict("records")
    assert (before["metric"], before["n"]) == ("byte_perplexity", 2)
    assert after["change"] == pytest.approx(after["value"] - before["value"])
    assert after["change"] != 0
    assert after["change_low"] != after["change_low"]  # NaN


@pytest.mark.parametrize(
    ("intervention", "said"),
    [
        ({"action": "mask", "experts": [1], "tokens": "generated"}, "neither prompt nor answer"),
        ({"action": "mask", "experts": [1], "prompt_ids": [3]}, "prompt_ids"),
        ({"action": "replay", "run": "base"}, "replays run 'base'"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused(
    whole_texts: HarnessTasks, intervention: dict[str, Any], said: str
) -> None:
    plan = SteeringPlan(interventions=[{"layer": 0, **intervention}])
    with pytest.raises(PlanError, match=said):
        check_tasks(plan, whole_texts)


def test_a_plan_is_refused_before_anything_is_run(tiny_bundle: Any, tasks: HarnessTasks) -> None:
    def never(_done: int, _total: int) -> None:
        raise AssertionError

    with pytest.raises(PlanError, match="layer 9"):
        run_tasks(
            tiny_bundle, tasks, SteeringPlan(interventions=[
                {"action": "mask", "layer": 9, "experts": [0]}
            ]), progress=never,
        )  # fmt: skip
    with pytest.raises(PlanError, match="changes nothing"):
        run_tasks(tiny_bundle, tasks, SteeringPlan(), progress=never)


def test_a_plan_without_experts_has_no_random_control(
    tiny_bundle: Any, tasks: HarnessTasks
) -> None:
    done: list[tuple[int, int]] = []
    plan = SteeringPlan(interventions=[{"action": "top_k", "layer": 1, "value": 1}])
    found = run_tasks(
        tiny_bundle, tasks, plan, num_controls=3, limit=1,
        progress=lambda now, total: done.append((now, total)),
    )  # fmt: skip
    assert [one.name for one in found.conditions] == ["unsteered", "steered"]
    assert found.notes == ("the plan names no experts, so random experts cannot be its control",)
    assert done[-1] == (20, 20)  # two labels, four choices and an answer, two conditions
