"""Benchmarks: real services under real load."""
