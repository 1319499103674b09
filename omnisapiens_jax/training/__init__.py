"""The loops, read top to bottom; checkpoints; metrics writing."""
