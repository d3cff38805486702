"""How a router turns logits into selected experts and routing weights, as data.

A rule says what a model family's own code does; `moescope.kernels.route.select` carries it out.
The steps, each a field or two: logits (plus a bias) become scores; a selection bias and groups
decide who may be chosen; the K best are taken; their weights are read from the scores or computed
from the K logits; they are normalized and scaled. Which family has which rule is found by reading
its router's code in transformers (`models/<family>/modeling_<family>.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

#: How logits become the scores by which experts are ranked.
Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity", "probabilities"]
#: Where the routing weights of the K selected experts come from.
Weights = Literal[
    "score",
    "softmax_topk",
    "sigmoid_topk",
    "sigmoid_all",
    "sparsemixer",
    "logsigmoid_shared",
    "scaled_probability",
]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Experts in groups of equal size, of which only the best may be chosen from.

    Attributes:
        count: groups G; E is divisible by it.
        kept: groups that may be chosen from.
        score: a group's score: the sum of its two best selection scores, or its best one.
        fill: what the selection scores of the other groups become; 0.0 can still be chosen.
        masks_weights: whether the weights are read from the filled scores too (DeepSeek-V2).
    """

    count: int
    kept: int
    score: Literal["top2_sum", "max"]
    fill: Literal["-inf", "0"]
    masks_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """The selection rule of one router.

    Attributes:
        num_experts: classes E that the router scores: routed experts, and after them
            zero-computation experts where the family has them.
        top_k: experts selected per token, K.
        score: how logits become scores. `probabilities`: the router returns probabilities already.
        weights: where weights come from. `score`: the score of the selected expert;
            `softmax_topk` and `sigmoid_topk`: that function of the K logits, after top-k;
            `sigmoid_all`: the sigmoid of all logits (Llama 4), which rounds otherwise than that of
            the K logits where one is vectorized and the other not;
            `sparsemixer`: Phi-3.5-MoE; `logsigmoid_shared`: Inkling, normalized together with the
            shared experts; `scaled_probability`: Gemma 4, times a factor per expert after
            renormalization.
        selection_bias: `none`, or what the router's bias tensor is added to for choosing only:
            `score`, or `logit` (Kolibri). Weights are always read without it.
        groups: group-limited selection, or None.
        renormalize: whether the K weights are divided by their sum.
        epsilon: of that division: added to the sum, or (`epsilon_is_floor`) its smallest value.
        norm_order: p of the norm that DBRX divides by; None is the plain sum, which rounds
            otherwise than the 1-norm.
        scale: factor on the weights, after renormalization.
        scale_in_block: whether that factor is applied in the block, after the experts, so that
            the weights which the router returns are without it.
        arithmetic: dtype of the scores: `float32`, or `native`, that of the logits.
        weight_dtype: dtype of the returned weights: `logits`, that of the logits, or by name
            (where logits are float32 and weights return to the hidden states' dtype).
        sorted_ids: whether top-k is called sorted; unsorted ids come in another order from K = 3.
        divided_by_top_k: whether the weights are divided by K at the end (OpenAI's privacy filter,
            whose block multiplies by K again).
        num_zero_experts: of the E, the last ones that compute nothing (identity), Z.
        has_skip: whether class E - 1 means that no expert is used (Zaya); such a slot has weight 0.
        jitter: threshold of `sparsemixer`.
        from_table: whether ids come from a table by token id instead of the scores (hash layers).
        capacity: tokens an expert takes per sequence (Switch); a token beyond keeps the id of the
            expert that it was meant for, with weight 0.
    """

    num_experts: int
    top_k: int
    renormalize: bool
    score: Score = "softmax"
    weights: Weights = "score"
    selection_bias: Literal["none", "score", "logit"] = "none"
    groups: Groups | None = None
    epsilon: float = 0.0
    epsilon_is_floor: bool = False
    norm_order: float | None = None
    scale: float = 1.0
    scale_in_block: bool = False
    arithmetic: Literal["float32", "native"] = "float32"
    weight_dtype: Literal["logits", "float32", "bfloat16", "float16"] = "logits"
    sorted_ids: bool = True
    divided_by_top_k: bool = False
    num_zero_experts: int = 0
    has_skip: bool = False
    jitter: float = 0.0
    from_table: bool = False
    capacity: int | None = None

    def __post_init__(self) -> None:
        """Refuse rules that no router can have."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"a router with {self.num_experts} experts cannot select {self.top_k} per token"
            )
        if self.groups is not None and self.num_experts % self.groups.count:
            raise ValueError(
                f"{self.num_experts} experts do not divide into {self.groups.count} groups"
            )

    def to_json(self) -> dict[str, object]:
        """The rule as plain data, for `layers.rule` and `moescope doctor`."""
        return asdict(self)

    @property
    def description(self) -> str:
        """The rule in a few words, for people: what decides who is chosen and with what weight."""
        if self.from_table:
            chosen = f"{self.top_k} of {self.num_experts} from a table by token id"
        else:
            chosen = f"{self._score_in_words}, top-{self.top_k} of {self.num_experts}"
        if self.groups is not None:
            groups = self.groups
            best = "two best" if groups.score == "top2_sum" else "best"
            chosen += f" within {groups.kept} of {groups.count} groups by their {best}"
            chosen += " (others count as 0)" if groups.fill == "0" else ""
        parts = [chosen, self._weights_in_words, *self._extras_in_words()]
        return ", ".join(part for part in parts if part)

    @property
    def _score_in_words(self) -> str:
        names = {"identity": "logits", "sqrtsoftplus": "sqrt-softplus"}
        name = "logits" if self.weights == "sparsemixer" else names.get(self.score, self.score)
        if self.selection_bias == "none":
            return name
        return f"{name} plus bias" if self.selection_bias == "score" else f"{name} of biased logits"

    @property
    def _weights_in_words(self) -> str:
        after = {
            "softmax_topk": "softmax of the chosen",
            "sigmoid_topk": "sigmoid of the chosen",
            "sigmoid_all": "sigmoid of the chosen",
            "sparsemixer": "sparse-mixer weights",
            "logsigmoid_shared": "log-sigmoid weights normalized with the shared experts",
            "score": "",
            "scaled_probability": "",
        }[self.weights]
        if self.weights in ("sparsemixer", "logsigmoid_shared", "softmax_topk"):
            return after + (" renormalized" if self.renormalize else "")
        tail = "renormalized" if self.renormalize else "not renormalized"
        if self.renormalize and self.norm_order not in (None, 1.0):
            tail = f"divided by their {self.norm_order:g}-norm"
        if self.weights == "scaled_probability":
            tail += ", times a factor per expert"
        return f"{after} {tail}".strip()

    def _extras_in_words(self) -> list[str]:
        extras = []
        if self.scale != 1.0:
            extras.append(
                f"times {self.scale:g}" + (" in the block" if self.scale_in_block else "")
            )
        if self.num_zero_experts:
            extras.append(f"the last {self.num_zero_experts} compute nothing")
        if self.has_skip:
            extras.append("the last class skips the experts")
        if self.capacity is not None:
            extras.append(f"at most {self.capacity} tokens an expert and sequence")
        return extras
