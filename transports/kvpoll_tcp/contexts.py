"""The two `ssl.SSLContext`s of a transport with TLS, checked before anything is opened."""

from __future__ import annotations

import contextlib
import hashlib
import ssl

from kvpoll_fsm.address import Address
from kvpoll_fsm.errors import InvalidInput

__all__ = ["FINGERPRINT_NBYTES", "Contexts", "check_contexts", "check_verifies", "fingerprint_of"]

FINGERPRINT_NBYTES = 32
Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
"""For the side that is connected to, and for the one that connects."""


def check_contexts(tls: object, host: str) -> None:
    """Refuse contexts that could not work, or would protect nothing.

    Args:
        tls: What was given as `tls`.
        host: Where this transport is reached.

    Raises:
        InvalidInput: Says what is wrong with which context.
    """
    if not isinstance(tls, tuple) or len(tls) != 2 or not all(isinstance(each, ssl.SSLContext) for each in tls):
        raise InvalidInput(f"tls={tls!r}: give (server context, client context), both ssl.SSLContext")
    server, client = tls
    if server.protocol == ssl.PROTOCOL_TLS_CLIENT or client.protocol == ssl.PROTOCOL_TLS_SERVER:
        raise InvalidInput("tls: the server's context comes first, PROTOCOL_TLS_SERVER, then the client's")
    fingerprint_of(server)
    check_verifies(client, host)


def check_verifies(client: ssl.SSLContext, host: str) -> None:
    """Refuse a context that takes any certificate, unless it is for this machine.

    Raises:
        InvalidInput: It is not.
    """
    if client.verify_mode == ssl.CERT_NONE and not Address(host, 0).is_loopback:
        raise InvalidInput(
            f"tls: the client context verifies no certificate (verify_mode=CERT_NONE), which is refused for {host}: "
            "load the certificate authority with load_verify_locations() and leave verify_mode=CERT_REQUIRED"
        )


def fingerprint_of(server: ssl.SSLContext) -> bytes:
    """SHA-256 of the certificate that a server context shows, found by asking it.

    Raises:
        InvalidInput: It has none, or its settings rule out any handshake.
    """
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.check_hostname, asking.verify_mode = False, ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client, shown = asking.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
        for side in (client, shown, client, shown, client):  # TLS 1.3 is over with the third turn, 1.2 with the last
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                if side is client:  # else the server might ask for a certificate in turn
                    break
        certificate = client.getpeercert(binary_form=True)
    except (ssl.SSLError, ValueError) as error:
        needs = "load_cert_chain() comes first, and TLS 1.3 if senders are to show certificates"
        raise InvalidInput(f"tls: the server context shows no certificate: {needs} ({error})") from None
    if not certificate:
        raise InvalidInput("tls: the server context shows no certificate")
    return hashlib.sha256(certificate).digest()
