"""What may be relied on: bounds on disagreement, watched while a service runs, and liars."""
