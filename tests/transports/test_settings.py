"""What all transports say of settings that they do not have."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm import Endpoint, InvalidInput
from kvpoll_mooncake import MooncakeTransport
from kvpoll_shm import ShmTransport
from kvpoll_tcp import TcpTransport
from tests.helpers import pool


@pytest.mark.parametrize("transport", [TcpTransport, ShmTransport, MooncakeTransport])
def test_a_setting_that_there_is_not(transport: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^max_stranger: there is no such setting; did you mean") as near:
        transport(max_stranger="hunter2")
    assert "hunter2" not in str(near.value)
    with pytest.raises(InvalidInput, match=r"^zzz: there is no such setting; there are: \w+, .*max_strangers"):
        transport(zzz=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"streams": 0}, "transport_options: 'tcp': streams=0: give int from 1"),
        ({"stream": 1}, "transport_options: 'tcp': stream: there is no such setting; did you mean streams"),
    ],
)
@pytest.mark.both
def test_an_endpoint_says_which_transport_it_is_of(options: dict[str, Any], words: str, isolation: str) -> None:
    end = Endpoint(pool=pool(4), transports="tcp", transport_options={"tcp": options}, isolation=isolation)
    with pytest.raises(InvalidInput, match=words):
        end.start()
