"""Asyncio pieces that the gateway, the service and clients share: HTTP/1.1, names, TLS, timers.

Nothing here imports torch, the scheduler, or the packages above.
"""
