"""A service and a gateway, tried by those who mean them no good.

Workers are killed and stopped, requests are malformed, clients are slow, bodies are bombs, and far
more is asked than can be answered. Behind the gateway, upstreams answer with other requests'
content, hang, reply with what is hard to read, or are not found. What is counted is what clients
see.
"""
