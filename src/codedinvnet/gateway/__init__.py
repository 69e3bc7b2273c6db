"""A proxy that hedges anything that speaks HTTP/1.1.

A request's way, module by module:

1. `server` has the client's connection; `requests` reads from it, while `memory` has room.
2. `routes` says whether it may be copied, and by which key its delay is learnt.
3. `dispatcher` hands it to the scheduler, and carries out what that decides.
4. `attempts` send it to an upstream, and find the first content of the answer.
5. `proxy` passes the winner's answer on, and `answers` writes it, byte for byte.

`cluster` knows which upstreams are up. `admin` has the gateway's own routes, `metrics` what it
counts, `options` what can be set, and `run` starts all of it. Nothing here needs PyTorch.
"""
