"""Serving: rules decide, workers compute, the service joins them, and faces speak to clients."""
