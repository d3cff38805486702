"""Training the demo models: resumable, and stage two touches the tuned experts alone."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope.probe.demo.batches import Encoder
from moescope.probe.demo.corpus import Corpus
from moescope.probe.demo.models import (
    load_shipped,
    materialize,
    round_weights,
    save_delta,
    save_plain,
    shipped_models,
    tuned_experts,
)
from moescope.probe.demo.recipes import DEMO
from moescope.probe.demo.train import learning_rate, new_model, run_stage, train_and_publish
from moescope.probe.demo.tuning import only_tuned
from moescope.probe.errors import InputError
from moescope.probe.shipped import shipped_path


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_path("models", "demo-base"))


def test_delta_on_a_base_is_the_tuned_model_and_nothing_else_changes(tmp_path, tokenizer):
    base = new_model(DEMO.shape, tokenizer, seed=1)
    round_weights(base)
    save_plain(base, tokenizer, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("base")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    plan = {0: [3], 4: [1, 30]}
    with only_tuned(base, plan):
        optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=0.1)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        base(input_ids=torch.arange(40)[None]).logits.square().mean().backward()
        optimizer.step()
    round_weights(base)
    save_delta(base, plan, tmp_path / "tuned", {"base": "base"})
    (tmp_path / "tuned" / "README.md").write_text("tuned")

    changed = {n for n, p in base.named_parameters() if not torch.equal(p, before[n])}
    assert all(".mlp.gate." in name or ".mlp.experts." in name for name in changed)
    for name in changed:
        layer = int(name.split(".")[2])
        rows = (base.get_parameter(name) != before[name]).flatten(1).any(1).nonzero().flatten()
        assert set(rows.tolist()) <= set(plan[layer])
    folder = materialize("tuned", tmp_path / "plain", tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name


def test_learning_rate_warms_up_stays_and_cools_down():
    stage = DEMO.stage_one
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert rates[0] < rates[stage.warmup // 2] < stage.learning_rate
    assert rates[stage.steps // 2] == stage.learning_rate
    assert rates[-1] < 0.05 * stage.learning_rate


class Interrupted(Encoder):
    """Stops the training at its third batch, as Ctrl-C does."""

    batches = 0

    def batch(self, items):
        self.batches += 1
        if self.batches == 3:
            raise KeyboardInterrupt
        return super().batch(items)


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, tokenizer):
    stage = replace(DEMO.stage_one, steps=4, batch_size=4)
    tiny = replace(DEMO, shape=replace(DEMO.shape, num_layers=2), stage_one=stage)
    corpus = Corpus(tiny.corpus)
    whole, parted = (new_model(tiny.shape, tokenizer, seed=5) for _ in range(2))
    run_stage(whole, Encoder(tokenizer), corpus, tiny, 1, tmp_path / "whole.pt")
    path = tmp_path / "parted.pt"
    with pytest.raises(KeyboardInterrupt):
        run_stage(parted, Interrupted(tokenizer), corpus, tiny, 1, path, checkpoint_every=2)
    again = new_model(tiny.shape, tokenizer, seed=6)
    run_stage(again, Encoder(tokenizer), corpus, tiny, 1, path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.soak
def test_training_makes_a_base_and_deltas_and_goes_on_where_it_stopped(tmp_path):
    corpus = replace(
        DEMO.corpus,
        languages={"en": 0.6, "el": 0.4},
        held_out=dict.fromkeys(DEMO.corpus.held_out, 1),
    )
    shape = replace(DEMO.shape, num_layers=2, vocab_size=400)
    first, second = (replace(s, steps=2, batch_size=8) for s in (DEMO.stage_one, DEMO.stage_two))
    tiny = replace(DEMO, shape=shape, corpus=corpus, stage_one=first, stage_two=second, num_tuned=3)
    train_and_publish(tiny, tmp_path / "work", tmp_path / "out")
    models = tmp_path / "out" / "models"
    assert shipped_models(models) == ["demo", "demo-base", "demo-random"]
    assert sum(map(len, tuned_experts("demo", models).values())) == 3
    assert tuned_experts("demo-base", models) == {}
    base, _ = load_shipped("demo-base", models)
    tuned, _ = load_shipped("demo-random", models)
    changed = {
        name
        for name, parameter in tuned.named_parameters()
        if not torch.equal(parameter, base.get_parameter(name))
    }
    assert changed
    assert all(".mlp." in name for name in changed)

    hashes = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    train_and_publish(tiny, tmp_path / "work", tmp_path / "out")
    assert hashes == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.safetensors")}
    with pytest.raises(InputError, match="another recipe"):
        train_and_publish(replace(tiny, seed=99), tmp_path / "work", tmp_path / "out")
