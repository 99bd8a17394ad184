"""NIXL with its UCX backend: over tcp alone, and over whatever UCX picks on one host."""

from __future__ import annotations

import base64
import os
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Side, Told

__all__ = ["PEERS"]


class _Agent(Side):
    """What both have."""

    def _start(self) -> None:
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        config = nixl_agent_config(enable_prog_thread=True, enable_listen_thread=False, backends=["UCX"])
        self._agent: Any = nixl_agent(f"bench-{os.getpid()}", config)
        whole = [(self.memory.address, len(self.memory.buffer), 0, "")]
        self._registered = self._agent.register_memory(whole, "DRAM")

    def close(self) -> None:
        """Let go of the memory."""
        self._agent.deregister_memory(self._registered)


class Receiver(_Agent):
    """Owns the memory; its agent's thread does the rest."""

    def listen(self) -> Told:
        """Start the agent."""
        self._start()
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": self.memory.address}


class Sender(_Agent):
    """Writes."""

    def join(self, told: Told) -> None:
        """Start the agent and meet the other."""
        self._start()
        self._peer = self._agent.add_remote_agent(base64.b64decode(told["metadata"]))
        self._base = told["address"]
        self._handle: Any = None

    def prepare(self, case: Case, told: Told) -> Told:
        """Prepare the request, which can be posted again and again."""
        if self._handle is not None:
            self._agent.release_xfer_handle(self._handle)
        pieces = case.pieces()
        sources = [(self.memory.address + piece.src, piece.nbytes, 0) for piece in pieces]
        targets = [(self._base + piece.dst, piece.nbytes, 0) for piece in pieces]
        self._handle = self._agent.initialize_xfer(
            "WRITE",
            self._agent.get_xfer_descs(sources, "DRAM"),
            self._agent.get_xfer_descs(targets, "DRAM"),
            self._peer,
        )
        return {}

    def transfer(self) -> None:
        """Post it and ask until it is done, as its examples do."""
        state = self._agent.transfer(self._handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(self._handle)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended {state}")


def _peer(name: str, settings: str, **env: str) -> Peer:
    return Peer(
        name, "other", Sender, Receiver, settings=settings, needs=("nixl_cu12",), env={"UCX_LOG_LEVEL": "error", **env}
    )


PEERS = [
    _peer("nixl tcp", "UCX_TLS=tcp, progress thread, request prepared beforehand", UCX_TLS="tcp"),
    _peer("nixl", "UCX's own choice on one host, progress thread, request prepared beforehand"),
]
