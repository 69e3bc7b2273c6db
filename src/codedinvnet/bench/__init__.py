"""Comparisons of all methods: their accuracy, and their latency on the real service."""
