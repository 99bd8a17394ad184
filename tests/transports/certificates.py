"""Certificates made for a test: one authority, and contexts for both ends of a connection."""

from __future__ import annotations

import functools
import ssl
import tempfile

import trustme

from kvpoll_fsm.testing.conformance import Spec
from kvpoll_tcp import TcpTransport

HOSTS = ("127.0.0.1", "::1", "localhost")

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@functools.cache
def authority(name: str = "ours") -> trustme.CA:
    """A certificate authority; another name is another one."""
    return trustme.CA(organization_name=name)


def server_context(name: str = "ours") -> ssl.SSLContext:
    """For a receiver, with a certificate of its own for the addresses of this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority(name).issue_cert(*HOSTS).configure_cert(context)
    return context


def client_context(name: str = "ours") -> ssl.SSLContext:
    """For a sender that trusts this authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority(name).configure_trust(context)
    return context


def contexts(name: str = "ours") -> Contexts:
    """What the transport takes as `tls`."""
    return server_context(name), client_context(name)


def spec(**settings: object) -> Spec:
    """How another process makes a transport with a certificate of the same authority."""
    ours = authority("ours")
    certificate = ours.issue_cert(*HOSTS).private_key_and_cert_chain_pem.bytes().decode()
    trusted = ours.cert_pem.bytes().decode()
    return Spec(f"{__name__}:from_pem", {"certificate": certificate, "trusted": trusted, **settings})


def from_pem(certificate: str, trusted: str, **settings: object) -> TcpTransport:
    """What `spec` says."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(certificate)
        file.flush()
        server.load_cert_chain(file.name)
    client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=trusted)
    return TcpTransport(tls=(server, client), **settings)
