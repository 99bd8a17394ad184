"""iperf3, one stream over loopback: what people measure a network with."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from typing import Any

from benchmarks.cases import MIB
from benchmarks.peers.base import Peer, Sample, Side, Told

__all__ = ["PEERS"]

PATIENCE_S = 10.0
NBYTES = 512 * MIB
"""Sent by one run, so that its start does not count."""


class Receiver(Side):
    """The server."""

    def listen(self) -> Told:
        """Start it; returns when it listens."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._server = subprocess.Popen(["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL)
        ends_s = time.monotonic() + 10
        while not _answers(port):
            if time.monotonic() > ends_s:
                raise TimeoutError("iperf3 -s does not listen")
            time.sleep(0.01)
        return {"port": port}

    def close(self) -> None:
        """End it."""
        self._server.kill()
        self._server.wait()


class Sender(Side):
    """The client."""

    def join(self, told: Told) -> None:
        """Remember the port."""
        self._command = ["iperf3", "-c", "127.0.0.1", "-p", str(told["port"]), "-n", str(NBYTES), "-J"]
        self._command += self.options["more"]

    def transfer(self) -> Sample:
        """One run; the time is the one iperf3 took itself, for what its server received."""
        report = self._run()
        ends_s = time.monotonic() + PATIENCE_S
        while "busy" in report.get("error", "") and time.monotonic() < ends_s:  # with the run before, still
            time.sleep(0.05)
            report = self._run()
        if "error" in report:
            raise RuntimeError(report["error"])
        received = report["end"]["sum_received"]
        return received["seconds"], received["bytes"]

    def _run(self) -> dict[str, Any]:
        done = subprocess.run(self._command, capture_output=True, text=True, check=False)
        report: dict[str, Any] = json.loads(done.stdout)
        return report


def _answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _peer(name: str, more: tuple[str, ...], settings: str) -> Peer:
    return Peer(
        name,
        "limit",
        Sender,
        Receiver,
        settings=f"one stream, 512 MiB a run, {settings} (buffers of 128 KiB)",
        loop="beside",
        cases=("64MiB",),
        needs=("iperf3",),
        install="apt-get install iperf3",
        options={"more": more},
        verify=False,
    )


PEERS = [
    _peer("iperf3", (), "its defaults otherwise"),
    _peer("iperf3 reno", ("-C", "reno"), "-C reno, which is what we ask for within one machine"),
]
