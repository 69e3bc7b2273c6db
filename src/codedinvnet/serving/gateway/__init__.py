"""The gateway: stands before servers that speak the Open Inference Protocol V2."""
