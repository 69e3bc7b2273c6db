"""The protocol's published gRPC stubs, or one line that says how to install them."""

from __future__ import annotations

from codedinvnet.errors import UserError

try:
    import grpc
    from tritonclient.grpc import service_pb2 as pb
except (ImportError, RuntimeError) as error:  # tritonclient makes the first the second
    raise UserError("gRPC needs an extra: pip install 'codedinvnet[grpc]'") from error

SERVICE = "inference.GRPCInferenceService"
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

__all__ = ["SERVICE", "UNLIMITED", "grpc", "pb"]
