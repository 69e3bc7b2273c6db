"""The gateway's own token at upstreams."""

from __future__ import annotations

from pathlib import Path

from codedinvnet.net.guard import Token


class UpstreamToken(Token):
    """The gateway's own authorization at upstreams, in place of clients'.

    Args:
        path: the file with the token; None: upstreams get none.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, "--upstream-token-file")

    @property
    def field(self) -> bytes:
        """The header field, as it is sent; empty without a token."""
        return b"Authorization: Bearer %b\r\n" % self.text.encode() if self.text else b""
