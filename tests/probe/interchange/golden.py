"""The same tiny routing in every format and version that `moescope import` knows, written by hand.

Two layers, eight experts, two of them a token; sequences of five and three tokens.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

EXPERTS, TOP_K, LAYERS = 8, 2, 2
LENGTHS = (5, 3)
#: Of both sequences together: ids [tokens, layers, k] by rank, and their weights.
IDS = np.array([
    [[0, 3], [7, 1]], [[2, 5], [6, 0]], [[3, 0], [1, 7]], [[4, 1], [5, 2]], [[6, 7], [0, 4]],
    [[1, 2], [3, 6]], [[5, 0], [2, 7]], [[0, 6], [4, 5]],
])  # fmt: skip
WEIGHTS = np.array([0.75, 0.25], np.float32) * np.ones((8, 2, 1), np.float32)
COUNTS = np.stack([np.bincount(IDS[:, layer].ravel(), minlength=EXPERTS) for layer in range(2)])


@dataclass(frozen=True)
class Golden:
    """A format and version, its files, and what an import of them must say.

    Attributes:
        format: as typed after `moescope import`.
        version: in the report.
        write: writes the files into a folder and returns their paths.
        options: of `ImportOptions`.
        slots: recorded slots; 0 for counts.
        lacks: what the run lacks.
        has_weights, is_ranked: of what is stored.
        routed: tokens that were captured.
    """

    format: str
    version: str
    write: Callable[[Path], list[Path]]
    options: dict[str, Any] = field(default_factory=dict)
    slots: int = 32
    lacks: tuple[str, ...] = ()
    has_weights: bool = False
    is_ranked: bool = False
    routed: int = 8

    @property
    def name(self) -> str:
        return f"{self.format} {self.version}"


def esft(folder: Path) -> list[Path]:
    task = folder / "task"
    task.mkdir()
    for layer in range(LAYERS):
        lines = []
        for part in np.split(np.arange(8), [5]):
            ids = IDS[part, layer][:, ::-1].ravel()  # not in order of weight
            weights = WEIGHTS[part, layer][:, ::-1].ravel()
            lines.append("\t".join(map(str, ids)) + "\t\t" + "\t".join(map(str, weights)))
        (task / f"expert_weights_{layer + 1}.txt").write_text("\n".join(lines) + "\n")
    return [task]


def rows() -> Iterator[dict[str, Any]]:
    token = 0
    for sequence, length in zip(("a", "b"), LENGTHS, strict=True):
        for position in range(length):
            for layer in range(LAYERS):
                for rank in range(TOP_K):
                    yield {
                        "sequence": sequence, "position": position, "layer": layer, "rank": rank,
                        "expert": int(IDS[token, layer, rank]),
                        "weight": float(WEIGHTS[token, layer, rank]),
                    }  # fmt: skip
            token += 1


def table_parquet(folder: Path) -> list[Path]:
    pq.write_table(pa.Table.from_pylist(list(rows())), folder / "slots.parquet")
    return [folder / "slots.parquet"]


def table_csv(folder: Path) -> list[Path]:
    with (folder / "slots.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sequence", "position", "layer", "expert"])
        writer.writeheader()
        writer.writerows({name: row[name] for name in writer.fieldnames} for row in rows())
    return [folder / "slots.csv"]


def table_jsonl(folder: Path) -> list[Path]:
    (folder / "slots.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    return [folder / "slots.jsonl"]


#: Physical experts: 0 and 8 are two copies of logical expert 0, all others are shifted by one.
PHYSICAL_TO_LOGICAL = [0, 1, 2, 3, 4, 5, 6, 7, 0]


def sglang_stat(folder: Path) -> list[Path]:
    steps = np.zeros((4, LAYERS, EXPERTS), np.int32)
    steps[0], steps[1] = COUNTS - 1, 1
    data = {"rank": 0, "logical_count": torch.from_numpy(steps),
            "average_utilization_rate_over_window": None}  # fmt: skip
    torch.save(data, folder / "stat.pt")
    return [folder / "stat.pt"]


def sglang_per_pass(folder: Path) -> list[Path]:
    to_logical = torch.tensor([PHYSICAL_TO_LOGICAL] * LAYERS, dtype=torch.int32)
    paths = []
    for rank in (0, 1):
        records = []
        for number, part in enumerate(np.split(np.arange(8), [5])):
            counts = np.zeros((LAYERS, 9), np.int32)
            for layer in range(LAYERS):
                counts[layer] = np.bincount(IDS[part, layer].ravel(), minlength=9)
            counts[:, 8], counts[:, 0] = counts[:, 0], 0  # the copy took them all
            records.append({"forward_pass_id": number, "rank": rank, "gatherer_key": "primary",
                            "global_physical_count": torch.from_numpy(counts)})  # fmt: skip
        paths.append(folder / f"pass_{rank}.pt")
        torch.save({"records": records, "last_physical_to_logical_map": to_logical}, paths[-1])
    return paths


def sglang_per_token(folder: Path) -> list[Path]:
    """Both prompts in one extend pass, then two decode passes of both, then one of the first."""
    to_logical = torch.tensor([PHYSICAL_TO_LOGICAL] * LAYERS, dtype=torch.int32)

    def record(number: int, tokens: list[int], positions: list[int], parts: Any) -> dict[str, Any]:
        ids = np.full((LAYERS, len(tokens), 8), -1, np.int32)
        ids[:, :, :TOP_K] = np.where(IDS[tokens] == 0, 8, IDS[tokens]).transpose(1, 0, 2)
        return {
            "forward_pass_id": number, "rank": 0, "gatherer_key": "primary",
            "global_physical_count": torch.zeros((LAYERS, 9), dtype=torch.int32),
            "input_ids": [100 + token for token in tokens], "positions": positions,
            "extend_seq_lens": parts, "forward_mode": 1 if parts else 2,
            "topk_ids_of_layer": torch.from_numpy(ids), "misc_objects": [],
        }  # fmt: skip

    records = [
        record(0, [0, 1, 5], [0, 1, 0], [2, 1]),
        record(1, [2, 6], [2, 1], None),
        record(2, [3, 7], [3, 2], None),
        record(3, [4], [4], None),
    ]
    torch.save({"records": records, "last_physical_to_logical_map": to_logical}, folder / "t_0.pt")
    return [folder / "t_0.pt"]


def sglang_csv(folder: Path) -> list[Path]:
    paths = []
    for rank, part in enumerate(np.split(np.arange(8), [5])):
        lines = ["layer_id,expert_id,count"]
        for layer in range(LAYERS):
            counts = np.bincount(IDS[part, layer].ravel(), minlength=EXPERTS)
            lines += [f"{layer},{expert},{count}" for expert, count in enumerate(counts)]
        paths.append(folder / f"rank{rank}.csv")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def int32_text(ids: np.ndarray) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def parts() -> list[np.ndarray]:
    return [IDS[:5], IDS[5:]]


def sglang_native(folder: Path) -> list[Path]:
    lines = [
        json.dumps({"text": "an answer", "meta_info": {
            "prompt_tokens": 2, "completion_tokens": len(ids) - 1,
            "routed_experts": int32_text(ids)}})
        for ids in parts()
    ]  # fmt: skip
    (folder / "replies.jsonl").write_text("\n".join(lines))
    return [folder / "replies.jsonl"]


def sglang_openai(folder: Path) -> list[Path]:
    replies = [
        {"id": f"r{number}", "choices": [{"message": {"content": "an answer"}}],
         "usage": {"prompt_tokens": 2, "completion_tokens": len(ids) - 1},
         "sgl_ext": {"routed_experts": int32_text(ids)}}
        for number, ids in enumerate(parts())
    ]  # fmt: skip
    (folder / "replies.json").write_text(json.dumps(replies))
    return [folder / "replies.json"]


def vllm_033(folder: Path) -> list[Path]:
    """Three hidden layers, the first of which is dense: rows of zeros."""
    lines = []
    for number, ids in enumerate(parts()):
        dense = np.zeros((len(ids), 1, TOP_K), np.uint8)
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([dense, ids.astype(np.uint8)], axis=1))
        text = base64.b64encode(buffer.getvalue()).decode()
        lines.append(json.dumps({
            "id": f"r{number}", "model": "m", "usage": {"prompt_tokens": 2},
            "choices": [{"message": {"content": "an answer"}, "routed_experts": text}],
        }))  # fmt: skip
    (folder / "replies.jsonl").write_text("\n".join(lines))
    return [folder / "replies.jsonl"]


def vllm_021(folder: Path) -> list[Path]:
    """The first token of the first prompt was cached."""
    lines = []
    for number, ids in enumerate(parts()):
        prompt = ids[:2].copy()
        if number == 0:
            prompt[0] = -1
        lines.append(json.dumps({
            "id": f"r{number}", "prompt_routed_experts": prompt.tolist(),
            "choices": [{"text": "an answer", "routed_experts": ids[2:].tolist()}],
        }))  # fmt: skip
    (folder / "replies.jsonl").write_text("\n".join(lines))
    return [folder / "replies.jsonl"]


def vllm_older(folder: Path) -> list[Path]:
    replies = [{"choices": [{"routed_experts": ids.tolist()}]} for ids in parts()]
    (folder / "replies.json").write_text(json.dumps(replies))
    return [folder / "replies.json"]


def imatrix(folder: Path) -> list[Path]:
    import gguf

    writer = gguf.GGUFWriter(folder / "imatrix.gguf", "llama")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 4)
    for layer in range(LAYERS):
        for part in ("gate", "up", "down"):
            name = f"blk.{layer + 1}.ffn_{part}_exps.weight"
            writer.add_tensor(f"{name}.in_sum2", np.ones((EXPERTS, 4), np.float32))
            writer.add_tensor(f"{name}.counts", COUNTS[layer].astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / "imatrix.gguf"]


def megatron(folder: Path) -> list[Path]:
    paths = []
    for rank, ids in enumerate(parts()):
        lines = [
            {"step": 7, "stage": "pre_dispatch", "block": ("decoder", "mtp")[layer],
             "layer": layer, "rank": rank, "num_tokens": len(ids), "topk": TOP_K,
             "top_indices": ids[:, layer].tolist()}
            for layer in range(LAYERS)
        ]  # fmt: skip
        paths.append(folder / f"router_trace_rank{rank}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, lines)))
    return paths


def atlas(folder: Path) -> list[Path]:
    lines = []
    start = 0
    for length in LENGTHS:
        activations = [
            {"layer": layer, "token_idx": token, "expert_idx": int(IDS[start + token, layer, rank]),
             "gate_weight": float(WEIGHTS[start + token, layer, rank])}
            for token in range(length) for layer in range(LAYERS) for rank in range(TOP_K)
        ]  # fmt: skip
        lines.append({
            "model_id": "m", "num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K,
            "text": "some words", "token_strs": [f"t{n}" for n in range(length)],
            "activations": activations, "timestamp": "2026-01-01T00:00:00",
        })  # fmt: skip
        start += length
    (folder / "atlas.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [folder / "atlas.jsonl"]


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A frame as pandas 2 pickled it: texts are objects."""
    with pd.option_context("future.infer_string", False):
        frame = pd.DataFrame(rows)
        frame.columns = pd.Index(list(frame.columns), dtype=object)
    return frame


def steermoe_table(folder: Path) -> list[Path]:
    rows = []
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            first = int((IDS[:5, layer] == expert).sum())
            second = int((IDS[5:, layer] == expert).sum())
            rows.append({
                "layer": layer, "expert": expert, "a1": float(first), "a2": float(second),
                "d1": 5.0 - first, "d2": 3.0 - second, "a1_n": first / 5, "a2_n": second / 3,
                "risk_diff": first / 5 - second / 3, "Layer_Expert": f"L{layer:02d}\nE{expert:02d}",
                "risk_diff_abs": abs(first / 5 - second / 3),
            })  # fmt: skip
    table_of(rows).to_pickle(folder / "activations_m_task.pkl")
    return [folder / "activations_m_task.pkl"]


def logits() -> np.ndarray:
    """Logits [layers, tokens, experts] whose two largest are the ids, by rank."""
    made = np.zeros((LAYERS, 8, EXPERTS), np.float16)
    for layer in range(LAYERS):
        for token in range(8):
            made[layer, token, IDS[token, layer]] = (2.0, 1.0)
    return made


def steermoe_logits(folder: Path) -> list[Path]:
    made = logits()
    rows = []
    for part in np.split(np.arange(8), [5]):
        rows.append({
            "router_logits": made[:, part],
            "messages": [{"role": "user", "content": "some words"}],
            "prompt_token_ids": [100 + int(token) for token in part],
            "prompt_tokens": [f"t{token}" for token in part],
            "prompt_tokens_special_mask": [False] * len(part),
        })  # fmt: skip
    frame = table_of(rows)
    frame.attrs = {"model_name": "m", "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    frame.to_pickle(folder / "output_m.pkl")
    return [folder / "output_m.pkl"]


def logits_pt(folder: Path) -> list[Path]:
    layers = tuple(torch.from_numpy(layer).float() for layer in logits())
    torch.save({"router_logits": layers}, folder / "logits.pt")
    return [folder / "logits.pt"]


def logits_npz(folder: Path) -> list[Path]:
    np.savez(folder / "logits.npz", **{f"layer_{n}": layer for n, layer in enumerate(logits())})
    return [folder / "logits.npz"]


def logits_safetensors(folder: Path) -> list[Path]:
    from safetensors.numpy import save_file

    arrays = {f"layers.{n}.logits": np.ascontiguousarray(x) for n, x in enumerate(logits())}
    save_file(arrays, folder / "logits.safetensors")
    return [folder / "logits.safetensors"]


IDS_ONLY = ("weights", "order", "scores", "token ids")
COUNTS_ONLY = ("weights", "order", "scores", "token ids", "text", "phases", "positions")
LOGITS = ("token ids", "text", "phases", "prompts")

GOLDEN = (
    Golden("esft", "text files, one a layer", esft, {"top_k": 2, "num_experts": 8},
           lacks=("order", "scores", "token ids", "text", "phases"), has_weights=True,
           is_ranked=True),
    Golden("table", "one row a slot", table_parquet, {"num_experts": 8},
           lacks=("scores", "token ids", "text", "phases"), has_weights=True, is_ranked=True),
    Golden("table", "one row a slot", table_csv, {"num_experts": 8},
           lacks=("scores", "token ids", "text", "phases", "weights", "order")),
    Golden("table", "one row a slot", table_jsonl, {"num_experts": 8},
           lacks=("scores", "token ids", "text", "phases"), has_weights=True, is_ranked=True),
    Golden("sglang", "stat", sglang_stat, {"top_k": 2}, slots=0, lacks=COUNTS_ONLY),
    Golden("sglang", "per_pass", sglang_per_pass, {"top_k": 2}, slots=0, lacks=COUNTS_ONLY),
    Golden("sglang", "per_token", sglang_per_token,
           lacks=("weights", "order", "scores", "text")),
    Golden("sglang", "CSV of 2025-03 to 2025-05", sglang_csv, {"top_k": 2}, slots=0,
           lacks=COUNTS_ONLY),
    Golden("sglang-reply", "native", sglang_native, {"top_k": 2, "num_experts": 8},
           lacks=(*IDS_ONLY, "text")),
    Golden("sglang-reply", "OpenAI", sglang_openai, {"top_k": 2, "num_experts": 8},
           lacks=(*IDS_ONLY, "text")),
    Golden("vllm", "0.33", vllm_033, {"num_experts": 8}, lacks=(*IDS_ONLY, "text")),
    Golden("vllm", "0.21", vllm_021, {"num_experts": 8}, lacks=(*IDS_ONLY, "text"), slots=28,
           routed=7),
    Golden("vllm", "before 0.21", vllm_older, {"num_experts": 8},
           lacks=(*IDS_ONLY, "phases", "text")),
    Golden("imatrix", "GGUF", imatrix, slots=0, lacks=(*COUNTS_ONLY, "prompts")),
    Golden("megatron", "pre_dispatch", megatron, {"num_experts": 8},
           lacks=(*IDS_ONLY, "text", "phases", "prompts")),
    Golden("atlas", "one trace a line", atlas,
           lacks=("order", "scores", "token ids", "phases"), has_weights=True, is_ranked=True),
    Golden("steermoe", "table of risk differences", steermoe_table, slots=0, lacks=COUNTS_ONLY),
    Golden("steermoe", "raw logits", steermoe_logits, lacks=("phases",), has_weights=True,
           is_ranked=True),
    Golden("router-logits", "pt", logits_pt, {"top_k": 2}, lacks=LOGITS, has_weights=True,
           is_ranked=True),
    Golden("router-logits", "npz", logits_npz, {"top_k": 2}, lacks=LOGITS, has_weights=True,
           is_ranked=True),
    Golden("router-logits", "safetensors", logits_safetensors, {"top_k": 2}, lacks=LOGITS,
           has_weights=True, is_ranked=True),
)  # fmt: skip
