"""Pools of workers, and what a worker does. They know no coding."""
