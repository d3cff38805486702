"""A batch that does not fit into memory runs in parts, and the run says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moescope.probe import Store, read_prompts, trace_prompts
from moescope.probe.batch_run import is_out_of_memory
from moescope.probe.errors import RecordingError
from moescope.probe.storage.run_log import read_log
from moescope.probe.storage.verify import verify_run
from moescope.probe.trace import TraceOptions

LIMITED = """
import resource, sys
import torch
from moescope.probe import load_model, read_prompts, trace_prompts
from moescope.probe.trace import TraceOptions

bundle = load_model(sys.argv[1])
prompts = read_prompts([sys.argv[2]])
MB_PER_TOKEN = 8

def allocate(module, args, kwargs):
    # As large activations do: real memory, in proportion to the padded tokens.
    torch.empty(kwargs["input_ids"].numel() * MB_PER_TOKEN * 2**20, dtype=torch.uint8)

bundle.model.register_forward_pre_hook(allocate, with_kwargs=True)
in_use = int(open("/proc/self/statm").read().split()[0]) * 4096
limit = in_use + int(sys.argv[4]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    options = TraceOptions(max_new_tokens=2)
    trace_prompts(bundle, prompts, sys.argv[3], "small", options, announce=print)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def saved_tiny(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model as a directory."""
    folder = tmp_path_factory.mktemp("model")
    tiny_bundle.model.save_pretrained(folder)
    tiny_bundle.tokenizer.save_pretrained(folder)
    return folder


def prompt_file(folder: Path) -> Path:
    path = folder / "questions.jsonl"
    texts = [f"What happened in {1811 + number} in Aldora?" for number in range(8)]
    rows = [{"id": f"q{number}", "prompt": text} for number, text in enumerate(texts)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def traced_with_little_memory(
    model: Path, prompts: Path, store: Path, megabytes: int
) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-c", LIMITED, str(model), str(prompts), str(store), str(megabytes)]
    return subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)


def test_a_batch_that_does_not_fit_is_run_in_parts(
    tiny_bundle: Any, saved_tiny: Path, tmp_path: Path
) -> None:
    prompts = prompt_file(tmp_path)
    store = tmp_path / "runs.duckdb"
    trace_prompts(
        tiny_bundle, read_prompts([prompts]), store, "large", TraceOptions(max_new_tokens=2)
    )
    longest = Store(store).query("SELECT max(num_tokens) AS n FROM prompts")["n"].item()
    # Room for three prompts at a time and for what else a process maps.
    done = traced_with_little_memory(saved_tiny, prompts, store, 3 * longest * 8 + 600)
    assert "was run in" in done.stdout, done.stdout + done.stderr
    run = Store(store).run("small")
    assert run.status == "complete"
    (parts,) = run.manifest["halved_batches"].values()
    assert parts in (2, 4, 8)
    assert verify_run(Store(store), "small") == []
    assert [e["parts"] for e in read_log(store, "small") if e["event"] == "halved"] == [parts]
    both = Store(store).query(
        "SELECT count(*) AS n, count(*) FILTER (a.expert = b.expert) AS same FROM routing a JOIN "
        "routing b USING (prompt_id, position, layer, rank) WHERE a.run_id = 'large' "
        "AND b.run_id = 'small'"
    )
    assert both["n"].item() > 0
    assert both["same"].item() >= 0.99 * both["n"].item()


def test_a_prompt_that_does_not_fit_alone_is_named(saved_tiny: Path, tmp_path: Path) -> None:
    prompts, store = prompt_file(tmp_path), tmp_path / "runs.duckdb"
    done = traced_with_little_memory(saved_tiny, prompts, store, 200)
    assert "RecordingError prompt 'q" in done.stdout, done.stdout + done.stderr
    assert "does not fit into the memory of cpu even alone" in done.stdout


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"), True),
        (RuntimeError("shape mismatch"), False),
        (RecordingError("rows"), False),
    ],
)  # fmt: skip
def test_which_errors_are_about_memory(error: BaseException, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory
