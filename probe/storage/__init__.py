"""The store: one DuckDB file of runs, filled through shards by one ingester, read by anyone."""

from moescope.probe.storage.ingester import IngesterProcess, IngestStatus, start_ingester
from moescope.probe.storage.locks import append, reading, writing
from moescope.probe.storage.migrate import migrate_store
from moescope.probe.storage.run_folder import (
    RunDescription,
    RunFolder,
    check_run_name,
    run_folder,
)
from moescope.probe.storage.runs import ResumePoint, begin_run, check_store_target
from moescope.probe.storage.schema import SCHEMA_VERSION, SHARD_TABLES
from moescope.probe.storage.shards import (
    ShardManifest,
    finished_shards,
    read_shard,
    shard_name,
    write_shard,
)
from moescope.probe.storage.store import RunInfo, Store
from moescope.probe.storage.verify import Problem, verify_run

__all__ = [
    "SCHEMA_VERSION",
    "SHARD_TABLES",
    "IngestStatus",
    "IngesterProcess",
    "Problem",
    "ResumePoint",
    "RunDescription",
    "RunFolder",
    "RunInfo",
    "ShardManifest",
    "Store",
    "append",
    "begin_run",
    "check_run_name",
    "check_store_target",
    "finished_shards",
    "migrate_store",
    "read_shard",
    "reading",
    "run_folder",
    "shard_name",
    "start_ingester",
    "verify_run",
    "write_shard",
    "writing",
]
