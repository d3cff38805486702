"""Putting requests together again from forward passes that tell positions and nothing else.

A prefill begins a request at position 0, or goes on with one whose next position it has (chunked
prefill, decoding). Where two open requests of a rank wait for the same position, the one that was
served longer ago takes it, as a scheduler serves its batch in order; such guesses are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.imported import MISSING, Array
from moescope.probe.interchange.report import ImportReport

_MOST_MISSING_BYTES: Final = 1 << 29


@dataclass
class Request:
    """One request: its tokens [T], ids [T, layers, k], and how many were decoded one by one."""

    tokens: Array
    ids: Array
    num_generated: int


@dataclass
class _Open:
    rank: int
    tokens: list[Array] = field(default_factory=list)
    ids: list[Array] = field(default_factory=list)
    length: int = 0
    generated: int = 0
    served: int = 0


class Requests:
    """Collects passes in order and gives the requests back."""

    def __init__(self) -> None:
        self._requests: list[_Open] = []
        self._passes = 0
        self._guesses = 0
        self._shape: tuple[int, ...] | None = None
        self._without_start = 0
        self._missing_bytes = 0

    def add(
        self,
        rank: int,
        positions: Array,
        tokens: Array,
        ids: Array,
        parts: Array | None,
        place: str,
    ) -> None:
        """A pass of a rank: positions and tokens [T], ids [T, layers, k].

        Args:
            rank: which rank ran it.
            positions: of each token in its request.
            tokens: input ids.
            ids: logical experts.
            parts: tokens of each request of an extend pass; None in a decode pass.
            place: for the message.

        Raises:
            ImportFileError: the parts do not add up, or layers differ from the passes before.
        """
        if self._shape is not None and ids.shape[1:] != self._shape:
            raise ImportFileError(f"{place} has other layers than the records before it")
        self._shape = ids.shape[1:]
        self._passes += 1
        if parts is None:
            starts = np.arange(len(positions))
        elif (parts < 0).any() or parts.sum() != len(positions):
            raise ImportFileError(f"{place}: extend_seq_lens sums to {parts.sum()}, not its tokens")
        else:
            starts = np.cumsum(parts) - parts
            starts = starts[parts > 0]
        ends = np.append(starts[1:], len(positions))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            own = positions[start:end]
            if (np.diff(own) != 1).any() or own[0] < 0:
                raise ImportFileError(f"{place}: positions of a request do not follow each other")
            self._extend(rank, int(own[0]), tokens[start:end], ids[start:end], parts is None, place)

    def _extend(
        self, rank: int, start: int, tokens: Array, ids: Array, is_decode: bool, place: str
    ) -> None:
        waiting = [
            request for request in self._requests
            if request.rank == rank and request.length == start and request.served < self._passes
        ]  # fmt: skip
        if start and waiting:
            self._guesses += len(waiting) > 1
            request = min(waiting, key=lambda request: request.served)
        elif start:  # recording began in the middle of it, or its prefix was cached
            self._without_start += 1
            self._missing_bytes += start * ids[0].nbytes
            if self._missing_bytes > _MOST_MISSING_BYTES:
                raise ImportFileError(f"{place}: a request goes on at position {start}")
            missing = np.full((start, *ids.shape[1:]), MISSING, ids.dtype)
            request = _Open(rank, [np.full(start, -1)], [missing], start)
            self._requests.append(request)
        else:
            request = _Open(rank)
            self._requests.append(request)
        request.tokens.append(tokens)
        request.ids.append(ids)
        request.length += len(tokens)
        request.generated += len(tokens) if is_decode else 0
        request.served = self._passes

    def finish(self, report: ImportReport) -> list[Request]:
        """All requests, in the order in which they began."""
        if not self._requests:
            raise ImportFileError("no pass has a token")
        if self._guesses:
            report.assumed.append(
                f"{self._guesses} times two open requests waited for the same position; the one "
                "served longer ago took it"
            )
        if self._without_start:
            report.assumed.append(
                f"{self._without_start} requests began before the recording, or had a cached "
                "prefix; the tokens before are kept as not captured"
            )
        return [
            Request(np.concatenate(request.tokens), np.concatenate(request.ids), request.generated)
            for request in self._requests
        ]
