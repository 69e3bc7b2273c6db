"""Several gateways that decide as one: the oldest runs the scheduler, the others ask it."""
