"""Benchmarks: accuracy, latency and speed, of the methods and of the parts of the design."""
