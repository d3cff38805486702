"""What a model will need, from its configuration alone: nothing is downloaded or allocated.

The model is built on the meta device, where tensors have shapes and no memory, and its routers are
found there as in the loaded model. The cache is what such a model keeps after a forward; the
experts do nothing in it, because they run data-dependent code and have no part in the cache.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.errors import MoescopeError
from moescope.probe.routers import RouterSite, find_routers

#: Lengths between which the growth of the cache is measured.
_CACHE_LENGTHS = (16, 48)
#: Bytes of one stored slot before compression: an expert id of 2 and a weight of 4.
_SLOT_BYTES = 6


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a model needs.

    Attributes:
        dtype: of the parameters.
        parameters: all of them.
        active_parameters: those that one token passes: all but the experts it does not select.
            None where the routers cannot be found without the weights.
        parameter_bytes: memory of parameters and buffers.
        cache_bytes_per_token: what a token adds to the cache while generating (with a sliding
            window: until the window is full); None where it cannot be told.
        trace_bytes_per_token: rows of level topk before compression; None as for active
            parameters.
    """

    dtype: str
    parameters: int
    active_parameters: int | None
    parameter_bytes: int
    cache_bytes_per_token: int | None
    trace_bytes_per_token: int | None

    def lines(self) -> list[str]:
        """The estimate in sentences."""
        active = (
            ""
            if self.active_parameters is None
            else (f", of which {self.active_parameters:,} are active per token")
        )
        cache = (
            "cannot be told before loading"
            if self.cache_bytes_per_token is None
            else (f"{self.cache_bytes_per_token:,} bytes a token")
        )
        trace = (
            "cannot be told before loading"
            if self.trace_bytes_per_token is None
            else (f"{self.trace_bytes_per_token:,} bytes a token before compression")
        )
        return [
            f"memory: {self.parameters:,} parameters{active}: "
            f"{as_gb(self.parameter_bytes)} in {self.dtype}",
            f"the cache while generating: {cache}; a trace at level topk: {trace}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain data."""
        return asdict(self)


def as_gb(num_bytes: int) -> str:
    """Bytes in GB (10**9), as people read them."""
    return f"{num_bytes / 1e9:,.2f} GB"


def estimate(model: nn.Module, *, stored_bytes: int | None = None) -> MemoryEstimate:
    """What a model on the meta device would need with its weights.

    Args:
        model: built on the meta device, in the dtype that it will have.
        stored_bytes: size of the weights as stored, where they are quantized: then their memory
            is that, not what the parameters' dtype says.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = [*model.parameters(), *model.buffers()]
    sites = _sites(model)
    first = next(model.parameters())
    return MemoryEstimate(
        dtype=str(first.dtype).removeprefix("torch.") if stored_bytes is None else "quantized",
        parameters=parameters,
        active_parameters=None
        if sites is None
        else parameters - sum(site.idle_parameters for site in sites),
        parameter_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held)
        if stored_bytes is None
        else stored_bytes,
        cache_bytes_per_token=None if sites is None else _cache_growth(model, sites),
        trace_bytes_per_token=None
        if sites is None
        else sum(site.info.top_k * _SLOT_BYTES for site in sites),
    )


def _sites(model: nn.Module) -> list[RouterSite] | None:
    """The routers, or None where their rules are read from weights that are not there."""
    try:
        return find_routers(model)
    except (MoescopeError, RuntimeError, NotImplementedError):
        return None


def _cache_growth(model: nn.Module, sites: list[RouterSite]) -> int | None:
    """Bytes that one more token adds to the cache, or None where the model will not run so."""
    for site in sites:
        if site.experts is not site.block:
            # The instance's own forward, on a model that is thrown away.
            site.experts.forward = _give_back
    try:
        sizes = [_cache_bytes(model, length) for length in _CACHE_LENGTHS]
    except Exception:  # whatever code cannot run without data: then it is not known
        return None
    growth = (sizes[1] - sizes[0]) / (_CACHE_LENGTHS[1] - _CACHE_LENGTHS[0])
    return round(growth) if growth > 0 else None


def _give_back(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states


def _cache_bytes(model: nn.Module, length: int) -> int:
    ids = torch.zeros((1, length), dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, Tensor)
    )


def stored_size(folder: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def free_memory(device: str) -> int | None:
    """Bytes that are free where a model is to lie, or None where the system does not tell.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, or `all` for every GPU and the machine's own memory.
    """
    if device == "all":
        gpus = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        return sum(gpus) + (_free_machine_memory() or 0)
    kind = torch.device(device)
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0])
    return _free_machine_memory() if kind.type == "cpu" else None


def _free_machine_memory() -> int | None:
    """Free memory of this machine, or of the container that it is."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, max(limit - used, 0))
