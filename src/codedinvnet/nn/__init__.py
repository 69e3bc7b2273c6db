"""Building blocks: invertible networks, heads, fusion encoders."""
