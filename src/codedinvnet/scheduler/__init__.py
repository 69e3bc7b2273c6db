"""The rules of the service: no I/O, no clock; the front end and the simulator drive them."""
