"""The rules of the service, without I/O or clock; services and the simulator drive them."""
