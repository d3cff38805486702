"""The server: on this machine only, refuses a port in use, ends cleanly."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from moescope.app.server import free_port, running, serve
from moescope.probe.errors import InputError, MoescopeError
from moescope.probe.storage.locks import writing

SERVE = """
import sys
from pathlib import Path
from moescope.app.server import serve
sys.exit(serve(Path(sys.argv[1]), int(sys.argv[2])))
"""


@pytest.fixture
def empty_store(tmp_path: Path) -> Path:
    store = tmp_path / "empty.duckdb"
    with writing(store):
        pass
    return store


@contextmanager
def served(
    store: Path, port: int, *, cwd: Path | None = None, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A process that serves, once it answers; with what it started, ended for sure."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SERVE, str(store), str(port)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, "it does not answer"
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.wait()


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_a_port_in_use_is_refused_in_a_sentence(empty_store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is in use"):
            serve(empty_store, port)


def test_a_port_that_another_program_has_on_all_addresses_is_in_use_too(empty_store: Path) -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as listener,
        pytest.raises(InputError, match="in use"),
    ):
        serve(empty_store, listener.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly_and_leaves_nothing_behind(
    empty_store: Path, number: signal.Signals
) -> None:
    port = free_port()
    with served(empty_store, port) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "Traceback" not in output
        assert not any(child.is_running() for child in children)
        assert not answers(port)


def test_under_nohup_it_outlives_the_terminal(empty_store: Path) -> None:
    port = free_port()
    with served(empty_store, port, before=["nohup"]) as process:
        os.kill(process.pid, signal.SIGHUP)
        time.sleep(1)
        assert process.poll() is None and answers(port)


def test_it_listens_on_this_machine_alone(empty_store: Path) -> None:
    with running(empty_store) as url:
        port = int(url.rsplit(":", 1)[1])
        listening = {
            connection.laddr
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
        assert listening == {("127.0.0.1", port)}
    assert not answers(port)


def test_files_in_the_folder_of_the_command_do_not_stand_in_for_libraries(
    empty_store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("click.py", "pandas.py", "duckdb.py"):
        (folder / name).write_text("raise SystemExit('a file of the user was imported')\n")
    (folder / ".streamlit").mkdir()
    (folder / ".streamlit" / "config.toml").write_text('[server]\naddress = "0.0.0.0"\n')
    with served(empty_store, free_port(), cwd=folder):
        pass


def test_a_server_that_cannot_start_is_reported(
    empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(MoescopeError, match="exit code"), running(empty_store):
        pass


def test_the_first_page_imports_neither_torch_nor_scipy(recorded_store: Path) -> None:
    code = (
        "import os, sys; from streamlit.testing.v1 import AppTest; "
        "import moescope.app.start, moescope.app.state as state; "
        "state.import_ahead = lambda *names: None; "
        "app = AppTest.from_file(sys.argv[1], default_timeout=60).run(); "
        "assert app.header[0].value == 'base', app.error; "
        "print(','.join(sorted(sys.modules)))"
    )
    main = Path(__file__).resolve().parents[2] / "app" / "main.py"
    found = subprocess.run(
        [sys.executable, "-c", code, str(main)], capture_output=True, text=True, check=True,
        env={**os.environ, "MOESCOPE_STORE": str(recorded_store)},
    )  # fmt: skip
    loaded = {name.split(".")[0] for name in found.stdout.strip().splitlines()[-1].split(",")}
    assert not loaded & {"torch", "transformers", "scipy", "sklearn"}
