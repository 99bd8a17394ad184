"""The targets by name: what is run, how a good input is changed, and good inputs to begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import decoders, local, sending, settings, shm, stage, stream
from tests.fuzz.choices import Choices
from tests.fuzz.mutate import mutate_file, mutate_packet, other_bytes

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """Something that takes bytes from elsewhere.

    Attributes:
        run: Takes an input; raises if a law is broken.
        mutate: Changes one thing in an input that has a structure; None if any bytes are as good.
        most_nbytes: Longest input worth trying.
        share: How much longer than others it is run by `make fuzz`, being slower or deeper.
    """

    run: Callable[[bytes], None]
    mutate: Callable[[bytes, Choices], bytes] | None = None
    most_nbytes: int = 512
    share: int = 1

    @property
    def name(self) -> str:
        return self.run.__name__

    def changed(self, data: bytes, choices: Choices) -> bytes:
        """The input with one thing changed."""
        return (self.mutate or other_bytes)(data, choices)

    def corpus(self) -> list[Path]:
        """The inputs that are kept."""
        return sorted((CORPUS / self.name).iterdir())


TARGETS = {
    target.name: target
    for target in (
        Target(decoders.packet, mutate_packet, 2048),
        Target(decoders.descriptor, mutate_packet),
        Target(decoders.trace_line, mutate_file, 1024),
        Target(decoders.trace_files, mutate_file, 4096),
        Target(decoders.key_files, most_nbytes=1024),
        Target(decoders.key_name),
        Target(decoders.counterexample, mutate_file, 1024),
        Target(decoders.demo_lines),
        Target(local.control_line),
        Target(local.config_file),
        Target(local.variables),
        Target(settings.address, most_nbytes=160),
        Target(settings.policy, most_nbytes=160),
        Target(settings.advertised, most_nbytes=160),
        Target(settings.layout),
        Target(settings.settings),
        Target(stream.reader, share=2),
        Target(stream.stranger),
        Target(sending.impostor),
        Target(sending.answers),
        Target(shm.shm_packet, mutate_packet),
        Target(shm.shm_descriptor, mutate_packet),
        Target(shm.shm_order),
        Target(stage.core, most_nbytes=1024, share=5),
    )
}
