"""gRPC, if it is installed: settings, and credentials that follow a certificate's files."""

from __future__ import annotations

from typing import Any

from codedinvnet.common.errors import UserError
from codedinvnet.net.tls import Certificate, Renewal

try:
    import grpc
except ImportError as error:
    raise UserError("gRPC needs an extra: pip install 'codedinvnet[grpc]'") from error

__all__ = ["grpc", "renewed_credentials", "settings"]


def settings(**values: int) -> tuple[tuple[str, int], ...]:
    """Return settings of a channel or server as gRPC takes them."""
    return tuple((f"grpc.{name}", value) for name, value in values.items())


def renewed_credentials(certificate: Certificate) -> Any:
    """Return a server's credentials: each connection begins with what the files have then."""

    def configuration() -> Any:
        pair = (certificate.key.read_bytes(), certificate.chain.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair])

    found: list[Any] = []
    renewal = Renewal(certificate, lambda: found.append(configuration()), "gRPC")

    def news() -> Any:  # called in threads of gRPC's
        renewal.look()
        return found.pop() if found else None

    return grpc.dynamic_ssl_server_credentials(configuration(), news)
