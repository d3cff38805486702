"""Stores written for a test: every token with its slots given by hand or drawn at random."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import threadpoolctl

from moescope.probe.demo.planted_routing import PlantedRouting, plant_routing
from moescope.probe.interchange.assemble import assemble
from moescope.probe.interchange.files import digest
from moescope.probe.interchange.imported import ImportOptions
from moescope.probe.interchange.into_store import store_import
from moescope.probe.interchange.registry import importer
from moescope.probe.storage.locks import insert_rows, reading, writing
from moescope.probe.storage.slots import arrays_of_slots, as_stored
from moescope.probe.storage.store import Store
from moescope.probe.storage.verify import verify_run

REAL_ROUTING = Path(__file__).resolve().parents[4] / "shared/data/deepseek_v2_lite_routing"

Slots = Mapping[int, Sequence[tuple[int, float]]]  # layer -> (expert, weight), any order


@dataclass(frozen=True, kw_only=True)
class Token:
    """One routed token; `scores` are its router scores by layer, else its weights stand in.

    Without an id or a text of its own it has those of its position: 3 and "t3" for the fourth.
    """

    slots: Slots
    phase: str = "prompt"
    segment: str = "user"
    is_special: bool = False
    in_span: bool = False
    scores: Mapping[int, Sequence[float]] = field(default_factory=dict)
    token_id: int | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt with its tokens; `fields` are columns of prompts, `meta` included."""

    tokens: Sequence[Token]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Shape:
    layer: int
    num_experts: int
    top_k: int
    kind: str = "mlp"


RANDOM_SHAPES = tuple(Shape(layer=layer, num_experts=8, top_k=2) for layer in (1, 2, 4))
PLANTED_SHAPES = tuple(Shape(layer=layer, num_experts=24, top_k=4) for layer in range(5))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_numpy() -> Iterator[None]:
    """Matrices are small here: a second thread doubles the processor time and gains nothing."""
    with threadpoolctl.threadpool_limits(1):
        yield


@cache
def empty_store() -> bytes:
    """A store without runs: copying one is much faster than making one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.duckdb"
        with writing(path):
            pass
        return path.read_bytes()


_last_written = ExitStack()


def kept_open(path: Path) -> Store:
    """The store at `path`, open until another is written.

    Opening a file takes most of the time that an analysis of a small run needs; while one
    connection is open, others take none.
    """
    _last_written.close()
    _last_written.enter_context(reading(path))
    return Store(path)


def edit(store: Store, *statements: str | tuple[str, Sequence[Any]]) -> None:
    """Change a store behind the product's back: SQL, or SQL and its parameters."""
    _last_written.close()
    with writing(store.path) as con:
        for statement in statements:
            con.execute(*((statement,) if isinstance(statement, str) else statement)).fetchall()
    kept_open(store.path)


def write_run(
    path: Path,
    shapes: Sequence[Shape],
    items: Sequence[Item],
    *,
    run_id: str = "run",
    record_level: str = "topk",
    status: str = "complete",
) -> Store:
    """Write one run; usage is summed here token by token, independently of the product."""
    prompts, tokens, routing = [], [], []
    usage: dict[tuple[Any, ...], dict[str, np.ndarray[Any, Any]]] = {}
    passed: dict[tuple[Any, ...], int] = defaultdict(int)
    for prompt_id, item in enumerate(items):
        num_prompt = sum(token.phase == "prompt" for token in item.tokens)
        fields = dict(item.fields)
        meta = fields.pop("meta", None)
        prompts.append(
            {"prompt_id": prompt_id, "text": f"text {prompt_id}", "rendered_text": "", "key": None,
             "set_name": "set", "label": None, "lang": None, "domain": None, "pair_id": None,
             "outcome": None, "num_tokens": num_prompt,
             "num_generated": len(item.tokens) - num_prompt,
             "meta": None if meta is None else json.dumps(meta)} | fields
        )  # fmt: skip
        for position, token in enumerate(item.tokens):
            tokens.append(
                {"prompt_id": prompt_id, "position": position,
                 "token_id": position if token.token_id is None else token.token_id,
                 "token": f"t{position}" if token.text is None else token.text,
                 "phase": token.phase, "segment": token.segment,
                 "is_special": token.is_special, "in_span": token.in_span, "is_routed": True}
            )  # fmt: skip
            for shape in shapes:
                slots = token.slots[shape.layer]
                ordered = sorted(slots, key=lambda slot: (-slot[1], slot[0]))
                for rank, (expert, weight) in enumerate(ordered):
                    routing.append(
                        {"prompt_id": prompt_id, "position": position, "layer": shape.layer,
                         "kind": shape.kind, "rank": rank, "expert": expert, "weight": weight}
                    )  # fmt: skip
                key = (prompt_id, token.phase, token.segment, token.is_special, shape.layer,
                       shape.kind)  # fmt: skip
                sums = usage.setdefault(
                    key, {name: np.zeros(shape.num_experts) for name in
                          ("num_tokens", "weight_sum", "prob_sum")}
                )  # fmt: skip
                passed[key] += 1
                for expert, weight in slots:
                    sums["num_tokens"][expert] += 1
                    sums["weight_sum"][expert] += weight
                if shape.layer in token.scores:
                    sums["prob_sum"] += np.asarray(token.scores[shape.layer])
                else:
                    for expert, weight in slots:
                        sums["prob_sum"][expert] += weight
    names = ("prompt_id", "phase", "segment", "is_special", "layer", "kind")
    arrays = [
        dict(zip(names, key, strict=True)) | {"routed_tokens": passed[key]}
        | {name: values.tolist() for name, values in sums.items()}
        for key, sums in usage.items()
    ]  # fmt: skip
    layers = [
        {"layer": shape.layer, "kind": shape.kind, "moe_layer": ordinal, "module": "router",
         "num_experts": shape.num_experts, "top_k": shape.top_k, "num_shared_experts": 0}
        for ordinal, shape in enumerate(shapes)
    ]  # fmt: skip
    tables = {"layers": layers, "prompts": prompts, "tokens": tokens, "usage_arrays": arrays}
    if record_level == "topk":
        tables["routing_arrays"] = routing
    _last_written.close()
    if not path.exists():
        path.write_bytes(empty_store())
    with writing(path) as con:
        con.execute(
            "INSERT INTO runs (run_id, model, revision, created_at, status, source, record_level, "
            "num_prompts, manifest) VALUES (?, 'planted', 'r1', now(), ?, 'recorded', ?, ?, '{}')",
            [run_id, status, record_level, len(prompts)],
        )
        for name, rows in tables.items():
            made = pa.Table.from_pylist(rows)
            if name == "routing_arrays":
                made = as_stored(arrays_of_slots(made))
            insert_rows(con, name, made, run_id=run_id)
    return kept_open(path)


def tokens_of(expert_lists: Sequence[Sequence[int]], **changes: Any) -> list[Token]:
    """Tokens at layer 0 that use the given experts, all with equal weights that sum to 1."""
    return [
        Token(slots={0: [(expert, 1 / len(experts)) for expert in experts]}, **changes)
        for experts in expert_lists
    ]


def random_item(
    rng: np.random.Generator,
    shapes: Sequence[Shape],
    lengths: Mapping[tuple[str, str, bool], int],
    **fields: Any,
) -> Item:
    """A prompt whose tokens select experts at random; `lengths` by (phase, segment, special)."""
    tokens = []
    for (phase, segment, is_special), length in lengths.items():
        for _ in range(length):
            slots, scores = {}, {}
            for shape in shapes:
                score = rng.dirichlet(np.full(shape.num_experts, 0.5))
                chosen = np.argsort(-score)[: shape.top_k]
                slots[shape.layer] = [(int(expert), float(score[expert])) for expert in chosen]
                scores[shape.layer] = score.tolist()
            tokens.append(
                Token(slots=slots, scores=scores, phase=phase, segment=segment,
                      is_special=is_special, in_span=bool(rng.random() < 0.3))
            )  # fmt: skip
    return Item(tokens=tokens, fields=fields)


def held_open(store: Store) -> Iterator[Store]:
    """The value of a fixture whose store many tests read and none writes; see `kept_open`."""
    with store.connection():
        yield store


def planted_items(truth: PlantedRouting) -> list[Item]:
    """The prompts of a planted routing, of `PLANTED_SHAPES`.

    Prompts with the same number within their language share a pair_id: they are the passages of the
    run, of one domain each.
    """
    items: list[Item] = []
    per_lang: Counter[str] = Counter()
    for prompt in np.unique(truth.prompt_ids):
        rows = np.flatnonzero(truth.prompt_ids == prompt)
        tokens = [
            Token(
                slots={
                    layer: list(zip(experts.tolist(), weights.tolist(), strict=True))
                    for layer, (experts, weights) in enumerate(
                        zip(truth.expert_ids[row], truth.weights[row], strict=True)
                    )
                }
            )
            for row in rows
        ]
        lang, domain = str(truth.langs[rows[0]]), str(truth.domains[rows[0]])
        pair_id = f"p{per_lang[lang]}"
        per_lang[lang] += 1
        items.append(
            Item(tokens=tokens, fields={"lang": lang, "domain": domain, "pair_id": pair_id})
        )
    return items


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Store]]:
    """Writes a run to a new store; see `write_run`."""

    def make(shapes: Sequence[Shape], items: Sequence[Item], **changes: Any) -> Store:
        return write_run(tmp_path_factory.mktemp("run") / "store.duckdb", shapes, items, **changes)

    yield make
    _last_written.close()


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The pieces runs are written from."""
    return SimpleNamespace(
        Token=Token, Item=Item, Shape=Shape, write_run=write_run, tokens_of=tokens_of,
        random_item=random_item, planted_items=planted_items, PLANTED_SHAPES=PLANTED_SHAPES,
        RANDOM_SHAPES=RANDOM_SHAPES, held_open=held_open, edit=edit,
    )  # fmt: skip


@pytest.fixture(scope="session")
def random_items() -> list[Item]:
    """24 items in three languages, random routing in 3 layers of 8 experts, all kinds of tokens."""
    rng = np.random.default_rng(7)
    items = []
    for number in range(24):
        for lang in ("de", "en", "zh"):
            lengths = {
                ("prompt", "template", True): 1,
                ("prompt", "system", False): int(rng.integers(1, 4)),
                ("prompt", "user", False): int(rng.integers(3, 9)),
                ("prompt", "template", False): 1,
                ("generated", "answer", False): int(rng.integers(2, 7)),
                ("generated", "answer", True): 1,
            }
            items.append(
                random_item(
                    rng, RANDOM_SHAPES, lengths, lang=lang, pair_id=f"p{number}",
                    label="ab"[number % 2], meta={"topic": number % 3, "a/b~c": str(number % 2)},
                )
            )  # fmt: skip
    return items


@pytest.fixture(scope="session")
def random_store(
    tmp_path_factory: pytest.TempPathFactory, random_items: list[Item]
) -> Iterator[Store]:
    """`random_items` as a run."""
    path = tmp_path_factory.mktemp("random") / "store.duckdb"
    yield from held_open(write_run(path, RANDOM_SHAPES, random_items))


@pytest.fixture(scope="session")
def planted_truth() -> PlantedRouting:
    """72 prompts of 20 tokens in four languages and three domains, and what is planted in them."""
    return plant_routing()


@pytest.fixture(scope="session")
def planted_store(
    tmp_path_factory: pytest.TempPathFactory, planted_truth: PlantedRouting
) -> Iterator[Store]:
    """`planted_truth` as a run; the id of a token is 1 where layer 2 uses expert 3, else 0."""
    items = [
        replace(
            item,
            tokens=[
                replace(token, token_id=int(3 in dict(token.slots[2]))) for token in item.tokens
            ],
        )
        for item in planted_items(planted_truth)
    ]
    path = tmp_path_factory.mktemp("planted") / "store.duckdb"
    yield from held_open(write_run(path, PLANTED_SHAPES, items))


@pytest.fixture(scope="session")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Real routing of DeepSeek-V2-Lite (deepseek-ai/ESFT): domains law and summary."""
    if not REAL_ROUTING.is_dir():
        pytest.skip(f"real recorded routing is not here ({REAL_ROUTING})")
    store = tmp_path_factory.mktemp("real") / "store.duckdb"
    paths, options = (
        [REAL_ROUTING / "law", REAL_ROUTING / "summary"],
        ImportOptions(model="deepseek-v2-lite"),
    )
    imported = importer("esft").read(paths, options)
    store_import(assemble(imported, options, digest(paths)), store, "real")
    assert verify_run(Store(store), "real") == []
    yield from held_open(Store(store))
