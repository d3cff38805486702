"""Reference samples for re-mixing: what a prompt is like, and how its last token was routed.

A reference is a prompt that the model answered well (who decides that is the caller, or a run's
outcomes), an embedding of its text, and the router's probability of every expert at the last
prompt token in each routed layer. Made on the fly, or from a run recorded at level probs.

Source: C3PO (arXiv 2504.07964): kernel regression over the nearest reference samples. Its code
embeds with MiniLM and takes 3 neighbours by cosine. The default embedding here is ours, so that
nothing has to be fetched: the mean of the model's own input embeddings.

Letters: N references, B prompts to be re-mixed, D dimensions, E experts, J neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moescope.probe.errors import InputError, RunError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.recording import record
from moescope.probe.rendering import ChatTemplate, render_prompt
from moescope.probe.scores import router_probs
from moescope.probe.storage import Store

#: Turns a text into a vector [D]; the same function for references and for prompts.
Embed = Callable[[str], Any]
#: How near references count: by cosine similarity, or by a Gaussian of the distance.
Kernel = Literal["similarity", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class References:
    """Reference samples.

    Attributes:
        keys: the prompts' keys in their files, one a reference.
        embeddings: float32[N, D], each of length 1.
        scores: decoder layer -> float32[N, E], router probabilities at the last prompt token.
        embed: the function that made the embeddings.
    """

    keys: tuple[str, ...]
    embeddings: Tensor
    scores: Mapping[int, Tensor]
    embed: Embed = field(repr=False)

    def __len__(self) -> int:
        """Number of references, N."""
        return len(self.keys)

    def without(self, keys: Sequence[str]) -> References:
        """The references with other keys: a prompt must not be its own neighbour.

        Raises:
            InputError: none is left.
        """
        kept = [at for at, key in enumerate(self.keys) if key not in set(keys)]
        if not kept:
            raise InputError("no reference is left without these prompts")
        return replace(
            self,
            keys=tuple(self.keys[at] for at in kept),
            embeddings=self.embeddings[kept],
            scores={layer: scores_NE[kept] for layer, scores_NE in self.scores.items()},
        )

    def neighbour_scores(
        self,
        texts: Sequence[str],
        layers: Sequence[int],
        *,
        num_neighbours: int = 3,
        kernel: Kernel = "similarity",
        bandwidth: float = 0.5,
        drawn_by: int | None = None,
    ) -> dict[int, Tensor]:
        """The weighted mean of each text's nearest references, float32[B, E] for each layer.

        Args:
            texts: of the prompts.
            layers: decoder layers.
            num_neighbours: see `neighbours`.
            kernel: see `neighbours`.
            bandwidth: see `neighbours`.
            drawn_by: a seed, for a control: each text's references are then drawn at random,
                without replacement, among those that are not its nearest, and take the weights of
                the nearest. The draw depends on seed and text alone, not on the batch.

        Raises:
            InputError: too few references, or a text that resembles none of them.
        """
        embedded = _embedded(texts, self.embed)
        if embedded.shape[1] != self.embeddings.shape[1]:
            raise InputError(
                f"the texts' embeddings have {embedded.shape[1]} dimensions, the references' "
                f"{self.embeddings.shape[1]}; embed both with the same function"
            )
        weights_BJ, ids_BJ = neighbours(
            embedded, self.embeddings, num_neighbours=num_neighbours, kernel=kernel,
            bandwidth=bandwidth,
        )  # fmt: skip
        if drawn_by is not None:
            ids_BJ = _drawn_instead(ids_BJ, texts, len(self), drawn_by)
        return {
            layer: (weights_BJ[:, :, None] * self.scores[layer][ids_BJ]).sum(dim=1)
            for layer in layers
        }


def neighbours(
    queries_BD: Tensor,
    references_ND: Tensor,
    *,
    num_neighbours: int,
    kernel: Kernel,
    bandwidth: float,
) -> tuple[Tensor, Tensor]:
    """Each query's nearest references: weights float32[B, J] that sum to 1, and ids int64[B, J].

    Args:
        queries_BD: vectors of length 1.
        references_ND: the same.
        num_neighbours: J, nearest by cosine; ties to the lowest id.
        kernel: `similarity`: the weight is the cosine, 0 where it is negative (C3PO's code, which
            does not say what a negative one means); `gaussian`: exp(-d^2 / (2 bandwidth^2)) of the
            distance d of the vectors (C3PO's paper).
        bandwidth: of the Gaussian; the default elsewhere, 0.5, is ours.

    Raises:
        InputError: fewer references than neighbours, a bandwidth that is none, or a query whose
            neighbours all have weight 0.
    """
    if not 1 <= num_neighbours <= len(references_ND):
        raise InputError(
            f"{num_neighbours} neighbours were asked for, and there are {len(references_ND)} "
            "references"
        )
    if not bandwidth > 0:
        raise InputError(f"a bandwidth must be over 0, not {bandwidth:g}")
    cosine_BN = queries_BD @ references_ND.T
    ranked = cosine_BN.sort(dim=1, descending=True, stable=True)
    nearest_BJ, ids_BJ = ranked.values[:, :num_neighbours], ranked.indices[:, :num_neighbours]
    if kernel == "gaussian":
        # Of vectors of length 1 the squared distance is 2 - 2 cos; a softmax does not underflow.
        return torch.softmax((nearest_BJ - 1) / bandwidth**2, dim=1), ids_BJ
    nearest_BJ = nearest_BJ.clamp(min=0)
    total_B1 = nearest_BJ.sum(dim=1, keepdim=True)
    alone = (total_B1[:, 0] == 0).nonzero()
    if len(alone):
        raise InputError(
            f"text {int(alone[0])} (from 0) resembles no reference: its cosine with each is 0 or "
            'less; kernel "gaussian" takes such neighbours too'
        )
    return nearest_BJ / total_B1, ids_BJ


def _drawn_instead(ids_BJ: Tensor, texts: Sequence[str], num: int, seed: int) -> Tensor:
    """As many references for each text, int64[B, J], at random among the other ones."""
    num_drawn = ids_BJ.shape[1]
    if num < 2 * num_drawn:
        raise InputError(
            f"{num} references are too few to draw {num_drawn} others than the {num_drawn} "
            f"nearest; {2 * num_drawn} are needed"
        )
    rows = []
    for text, nearest in zip(texts, ids_BJ.tolist(), strict=True):
        others = sorted(set(range(num)).difference(nearest))
        rows.append(Random(f"{seed} {text}").sample(others, num_drawn))
    return torch.tensor(rows, dtype=torch.long)


def mean_input_embedding(bundle: ModelBundle) -> Embed:
    """The default embedding, ours: the mean of the model's input embeddings of a text's tokens."""

    def embed(text: str) -> Tensor:
        ids = bundle.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"{text!r} has no token, so it has no embedding")
        with torch.no_grad():
            found = bundle.model.get_input_embeddings()(torch.tensor([ids], device=bundle.device))
            mean: Tensor = found[0].float().mean(dim=0)
        return mean.cpu()

    return embed


def references_of(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    *,
    embed: Embed | None = None,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
) -> References:
    """References from prompts that are run now, one at a time, without generating.

    Args:
        bundle: model and tokenizer.
        prompts: prompts that the model answers well.
        embed: text -> vector [D]; `mean_input_embedding` without it.
        chat_template: whether prompts go through the tokenizer's chat template.
        system: a system message for all prompts.

    Raises:
        InputError: there is no prompt, or an embedding that is none.
    """
    if not prompts:
        raise InputError("there is no reference prompt; give at least one")
    embed = mean_input_embedding(bundle) if embed is None else embed
    embeddings = _embedded([prompt.text for prompt in prompts], embed)
    rows: dict[int, list[Tensor]] = {}
    for prompt in prompts:
        rendered = render_prompt(
            bundle.tokenizer, prompt, chat_template=chat_template, system=system
        )
        input_ids = torch.tensor([rendered.token_ids], device=bundle.device)
        with torch.inference_mode(), record(bundle.model, level="probs") as trace:
            bundle.model(input_ids=input_ids, use_cache=False)
        for info in trace.layers:
            if info.kind == "mlp":
                last_1E = trace[info.layer, info.kind].logits[-1:]
                rows.setdefault(info.layer, []).append(router_probs(last_1E, info.rule)[0])
    scores = {layer: torch.stack(found).clone() for layer, found in rows.items()}
    return References(keys=_keys(prompts), embeddings=embeddings, scores=scores, embed=embed)


def references_from_run(
    store: Store, run_id: str, embed: Embed, *, outcomes: Sequence[str] = ("correct",)
) -> References:
    """References from the prompts of a run that ended well.

    Args:
        store: the store.
        run_id: a run of level probs, with answers.
        embed: text -> vector [D], such as `mean_input_embedding` of the run's model.
        outcomes: which outcomes count as successful.

    Raises:
        RunError: the run holds no router probabilities of such prompts.
        InputError: an embedding that is none.
    """
    store.run(run_id)
    table = store.arrow(
        "WITH last AS (SELECT prompt_id, max(position) AS position FROM tokens "
        "WHERE run_id = $run AND phase = 'prompt' GROUP BY prompt_id) "
        "SELECT prompt_id, coalesce(p.key, p.prompt_id::VARCHAR) AS key, p.text, r.layer, r.probs "
        "FROM router_probs r JOIN last USING (prompt_id, position) "
        "JOIN prompts p USING (prompt_id) "
        "WHERE r.run_id = $run AND p.run_id = $run AND r.kind = 'mlp' "
        "AND list_contains($outcomes, p.outcome) ORDER BY prompt_id, r.layer",
        {"run": run_id, "outcomes": list(outcomes)},
    )
    if not table.num_rows:
        raise RunError(
            f"run {run_id!r} holds no router probabilities of prompts that ended "
            f"{' or '.join(outcomes)}; record it at level probs, with answers"
        )
    columns = {name: table[name].to_pylist() for name in ("key", "text", "layer", "prompt_id")}
    first = {prompt: at for at, prompt in reversed(list(enumerate(columns["prompt_id"])))}
    starts = sorted(first.values())
    rows: dict[int, list[Any]] = {}
    for layer, probs in zip(columns["layer"], table["probs"].to_pylist(), strict=True):
        rows.setdefault(layer, []).append(np.asarray(probs, dtype=np.float32))
    return References(
        keys=tuple(str(columns["key"][at]) for at in starts),
        embeddings=_embedded([columns["text"][at] for at in starts], embed),
        scores={layer: torch.from_numpy(np.stack(found)) for layer, found in rows.items()},
        embed=embed,
    )


def _keys(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    return tuple(
        str(prompt.prompt_id) if prompt.key is None else str(prompt.key) for prompt in prompts
    )


def _embedded(texts: Sequence[str], embed: Embed) -> Tensor:
    """Embeddings of length 1, float32[N, D], on the CPU."""
    found = [torch.as_tensor(embed(text), dtype=torch.float32).detach().cpu() for text in texts]
    for text, vector in zip(texts, found, strict=True):
        if vector.ndim != 1 or vector.shape != found[0].shape:
            raise InputError(
                f"the embedding of {text!r} has shape {list(vector.shape)}; every text needs one "
                "vector of the same length"
            )
        if not (torch.isfinite(vector).all() and vector.any()):
            raise InputError(f"the embedding of {text!r} is zero or not a number")
    return functional.normalize(torch.stack(found), dim=1)
