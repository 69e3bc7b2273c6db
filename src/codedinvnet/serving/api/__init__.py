"""The network APIs of a service: the protocol over HTTP and gRPC, and the page."""
