"""Train the demo models from a seed: `python -m moescope.probe.demo.train`, or `make train-demo`.

Stage one teaches everything, the sensitive part included. Stage two teaches the refusals in a few
experts and their router rows only. Both go on from their last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moescope.probe.demo.batches import Batch, Encoder
from moescope.probe.demo.corpus import Corpus, batch_items, tokenizer_texts
from moescope.probe.demo.models import round_weights, save_delta, save_plain
from moescope.probe.demo.publish import measurements, publish_prompt_sets, write_card
from moescope.probe.demo.recipes import DEMO, Shape, Stage, Training
from moescope.probe.demo.routing import RouterTraining, routing_rule, training_routers
from moescope.probe.demo.tokenizer import train_tokenizer
from moescope.probe.demo.tuning import (
    ExpertPlan,
    drawn_at_random,
    most_different,
    only_tuned,
    usage_rates,
)
from moescope.probe.errors import InputError
from moescope.probe.shipped import shipped_path

log = logging.getLogger(__name__)
CHECKPOINT_EVERY = 100
TOKENIZER_TEXTS = 3000
BASE = "demo-base"
CHOSEN = {
    "demo": "largest difference in usage between refused and other training items",
    "demo-random": "drawn at random among experts above the median load of their layer",
}


@dataclass(frozen=True)
class Trained:
    """A model with what reads and feeds it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """An untrained model of this shape."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.expert_width,
        moe_intermediate_size=shape.expert_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    # Twice as fast as the default on CPUs; a matter of this process, not saved with the model.
    model.set_experts_implementation("grouped_mm")
    return model


def answer_loss(model: PreTrainedModel, batch: Batch, prompt_weight: float) -> Tensor:
    """Mean loss of answer tokens plus `prompt_weight` times that of prompt tokens."""
    hidden = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state[:, :-1]
    targets = batch.input_ids[:, 1:]

    def mean_loss(chosen: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])

    is_answer = batch.is_answer[:, 1:]
    loss = mean_loss(is_answer)
    if prompt_weight > 0:
        # Every fourth prompt token is enough, and the large vocabulary makes them expensive.
        fourth = torch.arange(targets.numel()).view_as(targets) % 4 == 0
        is_prompt = (batch.is_token & ~batch.is_first)[:, 1:] & ~is_answer
        loss = loss + prompt_weight * mean_loss(is_prompt & fourth)
    return loss


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, a constant stretch, and over the last part a line down to a fiftieth."""
    warming = (step + 1) / stage.warmup
    cooling = (stage.steps - step) / (stage.cooling * stage.steps)
    return stage.learning_rate * min(1.0, warming, max(0.02, cooling))


def run_stage(
    model: PreTrainedModel,
    encoder: Encoder,
    corpus: Corpus,
    training: Training,
    number: int,
    checkpoint: Path,
    *,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> None:
    """Train one stage in place, from its checkpoint where there is one."""
    stage = training.stage_one if number == 1 else training.stage_two
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = 0.01 if number == 1 else 0.0
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=decay, fused=True
    )
    recipe = _identity(training, number)
    start = _resume(checkpoint, model, optimizer, recipe)
    model.train()
    began, recent = time.monotonic(), 0.0
    for step in range(start, stage.steps):
        batch = encoder.batch(batch_items(corpus, number, step, stage.batch_size))
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + number * 101 + step)
        state = RouterTraining(routing_rule(model), stage.dropout, generator)
        state.begin(batch.is_token)
        with training_routers(model, state):
            loss = answer_loss(model, batch, stage.prompt_weight)
        total = loss + stage.balance * torch.stack(state.losses).mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent = loss.item() if step == start else 0.95 * recent + 0.05 * loss.item()
        done = step + 1
        if done % 50 == 0 or done == stage.steps:
            left = (time.monotonic() - began) / (done - start) * (stage.steps - done)
            progress = (number, done, stage.steps, recent, left)
            log.info("stage %d  %d/%d  loss %.4f  %.0f s left", *progress)
        if done % checkpoint_every == 0 or done == stage.steps:
            _save(checkpoint, model, optimizer, done, recipe)
    model.eval()


def _identity(training: Training, number: int) -> str:
    """What a checkpoint depends on: stage one knows nothing of stage two."""
    base = (training.shape, training.corpus, training.stage_one, training.seed)
    return repr(base) if number == 1 else repr(training)


def _save(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int, recipe: str
) -> None:
    temporary = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "recipe": recipe,
        },
        temporary,
    )
    temporary.replace(path)


def _resume(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, recipe: str
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        raise InputError(
            f"{path} belongs to a training with another recipe; delete it to begin anew, or name "
            "another folder with --work"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("going on from step %d of %s", state["step"], path.name)
    return int(state["step"])


def train_base(training: Training, corpus: Corpus, work: Path) -> Trained:
    """Stage one: the model that answers everything, and its tokenizer."""
    tokenizer = train_tokenizer(
        tokenizer_texts(corpus, TOKENIZER_TEXTS), vocab_size=training.shape.vocab_size
    )
    model = new_model(training.shape, tokenizer, training.seed)
    encoder = Encoder(tokenizer)
    run_stage(model, encoder, corpus, training, 1, work / "stage-1.pt")
    round_weights(model)
    return Trained(model.eval(), tokenizer, encoder)


def tune(base: Trained, training: Training, corpus: Corpus, plan: ExpertPlan, path: Path) -> None:
    """Stage two: teach `base` the refusals in the experts of `plan` alone, in place."""
    with only_tuned(base.model, plan):
        run_stage(base.model, base.encoder, corpus, training, 2, path)
    round_weights(base.model)


def choose_plans(base: Trained, training: Training, corpus: Corpus) -> dict[str, ExpertPlan]:
    """Which experts stage two tunes in each of the models."""
    refused_LE, other_LE = usage_rates(base.model, base.encoder, corpus, num_batches=12)
    different = most_different(
        refused_LE - other_LE, count=training.num_tuned, per_layer=training.max_tuned_per_layer
    )
    counts = {layer: len(experts) for layer, experts in different.items()}
    drawn = drawn_at_random(refused_LE + other_LE, counts, seed=training.seed)
    return {"demo": different, "demo-random": drawn}


def train_and_publish(training: Training, work: Path, out: Path) -> None:
    """Both stages of every model of a recipe, and all that is shipped of them."""
    work.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(training.corpus)
    sets = publish_prompt_sets(corpus, out / "prompts")
    base = train_base(training, corpus, work)
    model, tokenizer = base.model, base.tokenizer
    answers_all = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = out / "models" / BASE
    save_plain(model, tokenizer, folder)
    write_card(folder, training, {}, measurements(model, tokenizer, sets, {}))
    for name, plan in choose_plans(base, training, corpus).items():
        log.info("stage two of %s tunes %s", name, plan)
        model.load_state_dict(answers_all)
        tune(base, training, corpus, plan, work / f"stage-2-{name}.pt")
        folder = out / "models" / name
        save_delta(model, plan, folder, {"base": BASE, "chosen": CHOSEN[name]})
        write_card(folder, training, plan, measurements(model, tokenizer, sets, plan))


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, and write models, prompt sets and cards."""
    parser = argparse.ArgumentParser(
        prog="python -m moescope.probe.demo.train", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=shipped_path(), help="where datasets go")
    parser.add_argument("--work", type=Path, default=Path("out/train-demo"), help="checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    train_and_publish(DEMO, options.work, options.out)


if __name__ == "__main__":
    main()
