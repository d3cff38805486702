"""Serving the dashboard: Streamlit as a child process that listens on this machine only.

    serve(Path("demo.duckdb"), 8501)                  # until Ctrl-C
    with running(Path("demo.duckdb")) as url: ...     # for tests and scripts

All configuration is passed as flags, so neither the user's Streamlit settings nor the folder in
which the command was started change how the dashboard behaves. The process makes no request to the
network: usage statistics are off, and models come from this machine (`HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from moescope.probe.errors import InputError, MoescopeError

ADDRESS: Final = "127.0.0.1"
STORE_VARIABLE: Final = "MOESCOPE_STORE"
"""The environment variable by which the pages learn which store to show."""

_STOP_WITHIN_S: Final = 5.0
_OPTIONS: Final[Mapping[str, str]] = {
    "server.address": ADDRESS,
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": "false",
    "browser.gatherUsageStats": "false",
    "logger.hideWelcomeMessage": "true",
    "client.toolbarMode": "viewer",
    "client.showErrorDetails": "type",
    "client.showErrorLinks": "false",
    "runner.magicEnabled": "false",
    "theme.font": "sans-serif",
    "theme.baseRadius": "0.4rem",
    "theme.baseFontSize": "15",
    "theme.headingFontSizes": '["1.7rem","1.3rem","1.1rem"]',
    "theme.headingFontWeights": "[650,600,600]",
    "theme.metricValueFontSize": "1.3rem",
    "theme.metricValueFontWeight": "600",
    "theme.light.primaryColor": "#2f5fb3",
    "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f2f5f9",
    "theme.light.textColor": "#1c2430",
    "theme.light.linkColor": "#2f5fb3",
    "theme.light.borderColor": "#d8dee8",
    "theme.dark.primaryColor": "#7aa7f0",
    "theme.dark.backgroundColor": "#12161d",
    "theme.dark.secondaryBackgroundColor": "#1c222c",
    "theme.dark.textColor": "#e4e8ee",
    "theme.dark.linkColor": "#7aa7f0",
    "theme.dark.borderColor": "#323b49",
}


def serve(store: Path, port: int) -> int:
    """Serve the dashboard of a store until it is interrupted.

    Args:
        store: the store to show.
        port: on 127.0.0.1.

    Returns:
        0 after Ctrl-C or a termination signal, else the exit code of Streamlit.

    Raises:
        InputError: the port is in use or may not be used.
    """
    _require_free(port)
    with _ended_by_signals():
        process = _start(store, port)
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _stop(process)


@contextmanager
def running(store: Path, port: int | None = None, *, within_s: float = 60.0) -> Iterator[str]:
    """A dashboard for the length of a block.

    Args:
        store: the store to show.
        port: on 127.0.0.1; a free one without it.
        within_s: how long the server may take to answer, in seconds.

    Yields:
        Its address, once it answers.

    Raises:
        InputError: the port is in use.
        MoescopeError: the server ended or did not answer in time.
    """
    chosen = free_port() if port is None else port
    _require_free(chosen)
    process = _start(store, chosen)
    try:
        _wait_until_healthy(process, chosen, within_s)
        yield f"http://{ADDRESS}:{chosen}"
    finally:
        _stop(process)


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on now."""
    with socket.create_server((ADDRESS, 0)) as listener:
        return int(listener.getsockname()[1])


def command(port: int) -> list[str]:
    """The command line of the server."""
    flags = [f"--{name}={value}" for name, value in _OPTIONS.items()]
    script = Path(__file__).with_name("main.py")
    # -P: no file in the folder where the command was given may stand in for a library.
    program = [sys.executable, "-P", "-m", "moescope.app.start", "run", str(script)]
    return [*program, f"--server.port={port}", f"--browser.serverPort={port}", *flags]


def _start(store: Path, port: int) -> subprocess.Popen[bytes]:
    # A process group of its own: Ctrl-C reaches this process alone, which then ends the child once.
    environment = {
        # Threads of torch that wait give their core away: on a busy machine an answer takes one
        # second instead of thirty.
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        STORE_VARIABLE: str(store.resolve()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        command(port), env=environment, stdin=subprocess.DEVNULL, process_group=0
    )


def _require_free(port: int) -> None:
    try:
        with socket.create_server((ADDRESS, port)):
            pass
    except PermissionError as error:
        raise InputError(
            f"port {port} may not be used by this user; choose one from 1024 with --port"
        ) from error
    except OSError as error:
        raise InputError(
            f"port {port} on {ADDRESS} is in use; choose another with --port, or end what uses it"
        ) from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block as Ctrl-C does, so that no child is left behind.

    A signal that is ignored (SIGHUP under nohup) stays ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server: asked first, killed when it does not listen."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MoescopeError(f"the dashboard ended at once with exit code {process.returncode}")
        connection = http.client.HTTPConnection(ADDRESS, port, timeout=1)
        try:
            connection.request("GET", "/_stcore/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    raise MoescopeError(f"the dashboard did not answer within {within_s:g} seconds")
