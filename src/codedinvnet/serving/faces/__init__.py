"""Faces of the service: they read requests of a protocol and write its answers."""
