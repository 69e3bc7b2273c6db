"""Codes: how missing predictions are made up for."""
