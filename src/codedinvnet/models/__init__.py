"""Models: what answers a query."""
