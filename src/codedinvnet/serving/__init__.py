"""Serving: one model behind HTTP and gRPC, computed by workers that may be slow, hung or dead.

`api` reads requests and writes answers; `service` checks them against the model and makes queries
of them. `dispatch` tells the scheduler what happens, and carries out what it asks for: `calls` has
tasks computed by `workers`, `queries` keeps those in flight, `decoding` makes answers of outputs by
a code, `gate` releases approximate ones. `config` has the options, `opened` the model and its pool,
and `app` runs all this. docs/explanation/a-query.md draws the path of a query.
"""
