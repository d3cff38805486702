"""Running planned batches on a Ray cluster: actors that hold the model write shards.

Ray Data maps batches over a pool of actors. Each loads the model once, proves its routers, and
writes every batch as a whole shard, to a folder that all machines share or to any fsspec URL. A
worker that dies costs the batch that it was running: Ray starts another one and runs that batch
again. The ingester stays where the command was started.

Needs the extra `moescope[ray]`.
"""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.probe import errors
from moescope.probe.batching import PlannedBatch
from moescope.probe.engine import BatchDone, LocalEngine, ModelFacts
from moescope.probe.errors import InputError, MoescopeError
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.storage.remote_shards import fetch_shard, open_place, put_shard
from moescope.probe.trace_options import TraceOptions

_MOST_BLOCKS = 10_000
_OURS = re.compile(r"moescope\.probe\.errors\.(\w+): (.+)")


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How a run is spread.

    Attributes:
        workers: actors, each with a model of its own.
        gpus_per_worker: GPUs of each; 0 runs on CPUs.
        cpus_per_worker: CPUs of each, and its threads.
        shards_at: where workers leave shards: None for the run's own folder, which all machines
            must then see under the same path, or an fsspec URL such as `s3://bucket/runs`.
        address: of the cluster; None for the one this process is in, else one on this machine.
    """

    workers: int = 1
    gpus_per_worker: float = 0.0
    cpus_per_worker: int = 1
    shards_at: str | None = None
    address: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Arguments of `load_model`, for every worker to load the model itself."""

    name: str
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False


class RayEngine:
    """Runs batches on Ray.

    Args:
        source: the model.
        rendered: all prompts of the run, in order.
        options: how to run and what to keep.
        spread: over how many workers, and where their shards go.

    Raises:
        InputError: Ray is not installed, or the cluster has no room for so many workers.
        ModelInputError: what the first worker says of the model.
    """

    def __init__(
        self,
        source: ModelSource,
        rendered: Sequence[RenderedPrompt],
        options: TraceOptions,
        spread: RayOptions,
    ) -> None:
        self._ray = _started_ray(spread)
        self._rendered = rendered
        self._spread = spread
        self._arguments = (source, rendered[0], options, spread)
        if spread.shards_at is not None:
            open_place(spread.shards_at)  # a wrong URL is said before anything is loaded
        resources = {"num_cpus": spread.cpus_per_worker, "num_gpus": spread.gpus_per_worker}
        first = self._ray.remote(_facts_of_first_worker).options(**resources, max_retries=0)
        with _worker_errors():
            self.facts: ModelFacts = self._ray.get(first.remote(*self._arguments))

    def run(self, batches: Sequence[PlannedBatch], folder: Path) -> Iterator[BatchDone]:
        """Run batches on the workers, in the order in which they come free."""
        if not batches:
            return
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [
            {
                "index": batch.index,
                "members": pickle.dumps([self._rendered[index] for index in batch.members]),
            }
            for batch in batches
        ]
        place = str(folder) if self._spread.shards_at is None else self._spread.shards_at
        mapped = ray.data.from_items(
            items, override_num_blocks=min(len(items), _MOST_BLOCKS)
        ).map_batches(
            ShardWorker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self._spread.workers, len(items))),
            num_cpus=self._spread.cpus_per_worker,
            num_gpus=self._spread.gpus_per_worker or None,
            fn_constructor_args=(*self._arguments, place, folder.name),
        )
        with _worker_errors():
            for row in mapped.iter_rows():
                done = BatchDone(**row)
                if self._spread.shards_at is not None:
                    fetch_shard(self._spread.shards_at, folder.name, done.shard_id, folder)
                yield done


class ShardWorker:
    """An actor: a model that turns planned batches into shards."""

    def __init__(
        self,
        source: ModelSource,
        first: RenderedPrompt,
        options: TraceOptions,
        spread: RayOptions,
        place: str,
        run_name: str,
    ) -> None:
        self._engine = _engine(source, first, options, spread)
        self._spread = spread
        self._place = place
        self._run_name = run_name

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Run one planned batch; the columns are those of `BatchDone`."""
        done = [
            self._write(int(index), pickle.loads(members))
            for index, members in zip(rows["index"], rows["members"], strict=True)
        ]
        return {name: [getattr(one, name) for one in done] for name in vars(done[0])}

    def _write(self, index: int, members: list[RenderedPrompt]) -> BatchDone:
        batch = PlannedBatch(index, tuple(range(len(members))))
        if self._spread.shards_at is None:
            return self._engine.run_one(batch, members, _shared_folder(self._place))
        with tempfile.TemporaryDirectory(prefix="moescope-shard-") as temporary:
            done = self._engine.run_one(batch, members, Path(temporary))
            put_shard(Path(temporary) / done.shard_id, self._place, self._run_name)
        return done


def _shared_folder(place: str) -> Path:
    folder = Path(place)
    if not folder.is_dir():
        raise MoescopeError(
            f"this worker does not see the folder {folder} of the run: put the store where all "
            "machines see it under the same path, or give --shards-at a URL that all can reach"
        )
    return folder


def _facts_of_first_worker(
    source: ModelSource, first: RenderedPrompt, options: TraceOptions, spread: RayOptions
) -> ModelFacts:
    return _engine(source, first, options, spread).facts


def _engine(
    source: ModelSource, first: RenderedPrompt, options: TraceOptions, spread: RayOptions
) -> LocalEngine:
    """The model in this process, its routers proved on the run's first prompt."""
    import torch

    from moescope.probe.models import load_model

    torch.set_num_threads(spread.cpus_per_worker)
    bundle = load_model(
        source.name,
        device=source.device,
        dtype=source.dtype,
        revision=source.revision,
        device_map=source.device_map,
        trust_remote_code=source.trust_remote_code,
    )
    return LocalEngine(bundle, [first], options)


def _started_ray(spread: RayOptions) -> Any:
    """Ray, connected to a cluster that has room for the workers."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--engine ray needs Ray, which is not installed: pip install 'moescope[ray]'"
        ) from error
    if not ray.is_initialized():
        ray.init(
            address=spread.address,
            include_dashboard=False if spread.address is None else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    has = ray.cluster_resources()
    for resource, each in (("CPU", spread.cpus_per_worker), ("GPU", spread.gpus_per_worker)):
        needed, there = each * spread.workers, has.get(resource, 0.0)
        if needed > there:
            raise InputError(
                f"{spread.workers} workers with {each:g} {resource}s each need {needed:g}, and the "
                f"Ray cluster has {there:g}; use fewer workers, or add machines to it"
            )
    return ray


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Raise what a worker raised, in place of what Ray says of it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MoescopeError):
                raise cause from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        if not type(error).__module__.startswith("ray"):
            raise
        told = _OURS.findall(str(error))  # of some errors Ray keeps no more than their text
        if told:
            kind, sentence = told[-1]
            raise getattr(errors, kind, MoescopeError)(sentence.strip()) from None
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MoescopeError(f"a Ray worker failed: {first_line}") from error
