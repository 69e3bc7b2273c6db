"""The service simulated: imagined workers and time, the service's own rules."""
