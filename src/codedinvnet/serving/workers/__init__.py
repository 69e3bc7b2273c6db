"""Pools of workers, which know no coding; `computing` says what a worker loads and computes."""
