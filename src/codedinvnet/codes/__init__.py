"""Codes: what makes of a group's queries its tasks, and of their outputs the missing answers."""
