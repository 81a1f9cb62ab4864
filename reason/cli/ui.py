"""`reason ui`: MLflow's own pages on our store, announced only when they answer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Annotated

import typer

from reason.cli.output import say
from reason.errors import ConfigError, RunError

READY_S = 120  # the first start on a slow disk has taken 32 s
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def ui(
    port: Annotated[int, typer.Option(help="Port; if it is in use, another free port is chosen.")] = 5000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but the local machine requires --allowed-hosts.")
    ] = "127.0.0.1",
    allowed_hosts: Annotated[
        str, typer.Option(help="Comma-separated host names by which other machines may reach the server.")
    ] = "",
) -> None:
    """Show the runs in MLflow's web interface. Stop with Ctrl-C."""
    from reason.tracking.store import prepare, shown, tracking_uri

    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        prepare(uri)
        say("The tracking store is a server with its own web interface:")
        print(shown(uri))
        return
    if host not in LOOPBACK:
        if not allowed_hosts:
            raise ConfigError(
                f"--host {host} opens the web interface to other machines.",
                "Give the names by which it may be reached, e.g. --allowed-hosts myhost:5000. There is no password.",
            )
        say(f"Warning: anyone who can reach {host} can read and change every run; there is no password.")
    prepare(uri)
    free = _free_port(host, port)
    if free != port:
        say(f"Port {port} is in use; using {free}.")
    with _server(uri, host, free, allowed_hosts) as (server, output):
        _wait_until_ready(server, output, uri, host, free)
        say(f"Showing the runs in {shown(uri)}. Press Ctrl-C to stop.")
        print(f"http://{'127.0.0.1' if host in LOOPBACK else host}:{free}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            if server.wait():
                raise RunError("The MLflow server stopped unexpectedly.", _tail(output, uri))


@contextlib.contextmanager
def _server(uri: str, host: str, port: int, allowed: str) -> Iterator[tuple[subprocess.Popen, IO[bytes]]]:
    """The server and its output; its whole process group is gone on leaving, and if we are killed."""
    command = [sys.executable, "-m", "reason.engine.orphans", str(os.getpid()), "mlflow", "server"]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", allowed] if allowed else []
    # Job execution serves MLflow's own evaluation jobs, which we have none of: two processes fewer.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # Not as an argument: everybody sees those, and it may hold a password.
    store = {"MLFLOW_BACKEND_STORE_URI": uri}
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        with tempfile.TemporaryFile() as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            environment = os.environ | quiet | store
            server = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
            try:
                yield server, output
            finally:
                _end_group(server)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(*_: object) -> None:
    raise typer.Exit(143)


def _end_group(server: subprocess.Popen) -> None:
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            server.poll()  # reaps the leader, which would hold the group open
            try:
                os.killpg(server.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def _wait_until_ready(server: subprocess.Popen, output: IO[bytes], uri: str, host: str, port: int) -> None:
    import urllib.request

    reach = "127.0.0.1" if host in (*LOOPBACK, "0.0.0.0", "::") else host
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RunError("The MLflow server did not start.", _tail(output, uri))
        try:
            urllib.request.urlopen(f"http://{reach}:{port}/health", timeout=2).close()
            return
        except OSError:  # refused, reset, or an HTTP error: not yet
            time.sleep(0.2)
    raise RunError(f"The MLflow server did not answer within {READY_S} s.", _tail(output, uri))


def _tail(output: IO[bytes], uri: str) -> str:
    from reason.tracking.store import without_secrets

    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    return without_secrets("Its last output:\n" + "\n".join(lines[-8:]), uri)


def _free_port(host: str, port: int) -> int:
    """``port`` if nobody listens there, else one that the system has to spare."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port, 0):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if candidate == 0 or error.errno not in (13, 48, 98):  # EACCES, EADDRINUSE (mac, linux)
                    raise ConfigError(
                        f"Cannot listen on {host}: {error.strerror}.", "Check --host."
                    ) from error
                continue
            return probe.getsockname()[1]
    raise AssertionError("unreachable")
