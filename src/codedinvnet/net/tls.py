"""The certificate of a server, for both faces, and how it is renewed."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from codedinvnet.common.errors import UserError
from codedinvnet.net.logs import log_event

PERIOD = 1.0
"""Seconds between two looks for a renewed certificate."""
State: TypeAlias = tuple[tuple[int, int, int], ...]
"""What changes with a certificate's files; empty while one is missing."""


@dataclass
class Certificate:
    """A certificate, with those that it is derived from, and its key, in PEM files.

    Given other files, all that serve with it take what these have.
    """

    chain: Path
    key: Path

    def state(self) -> State:
        """Return what tells these files from those of another time."""
        try:
            found = [path.stat() for path in (self.chain, self.key)]
        except OSError:
            return ()
        return tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in found)


class Renewal:
    """Has a server go on with another certificate once its files have one.

    Args:
        certificate: the one that is served with.
        load: takes what the files have now; it is not called for what is no pair.
        face: whose, for the log.
    """

    def __init__(self, certificate: Certificate, load: Callable[[], None], face: str) -> None:
        self.certificate, self.load, self.face = certificate, load, face
        self._seen = certificate.state()

    def look(self) -> None:
        """Load the files if they have changed. What is no pair is logged, and not loaded."""
        state = self.certificate.state()
        if state == self._seen:
            return
        self._seen = state
        chain, key = self.certificate.chain, self.certificate.key
        try:
            read_certificate(chain, key)
            self.load()
        except (UserError, OSError, ValueError) as error:  # ssl.SSLError is an OSError
            event = "the old certificate is kept"
            log_event(event, logging.WARNING, face=self.face, reason=str(error))
        else:
            log_event("certificate renewed", face=self.face, file=str(chain))


async def follow(certificate: Certificate, context: ssl.SSLContext, face: str) -> None:
    """Have a context's new connections use what a certificate's files have, for ever."""

    def load() -> None:
        context.load_cert_chain(certificate.chain, certificate.key, _no_password)

    renewal = Renewal(certificate, load, face)
    while True:
        await asyncio.sleep(PERIOD)
        renewal.look()


def read_certificate(chain: Path | None, key: Path | None) -> Certificate | None:
    """Return a certificate that can be served with; None if none is asked for.

    Raises:
        UserError: if a file is missing, is none, or the two do not match.
    """
    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise UserError("--tls-cert and --tls-key: one needs the other")
    for flag, path in (("--tls-cert", chain), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise UserError(f"{flag}: cannot read {path}: {error.strerror}") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, _no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise UserError(f"--tls-cert: {chain} and {key} are not a pair: {reason}") from error
    return Certificate(chain, key)


def _no_password() -> str:
    raise ValueError("the key needs a password")
