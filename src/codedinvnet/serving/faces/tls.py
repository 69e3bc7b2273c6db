"""The certificate of a server, for both faces."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from codedinvnet.errors import UserError


@dataclass(frozen=True)
class Certificate:
    """A certificate, with those that it is derived from, and its key, in PEM files."""

    chain: Path
    key: Path


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
