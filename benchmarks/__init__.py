"""What only this repository's own figures need: no part of the package that is installed."""
