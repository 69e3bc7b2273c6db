"""Serving: scheduler (rules), pools (workers), front end (joins them), protocol and app (HTTP)."""
