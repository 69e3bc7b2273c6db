"""What only this repository's own figures need: no part of the package that is installed."""

INSTALL = "pip install -e bundles -e '.[benchmarks]'"
"""How a benchmark's packages are installed."""
