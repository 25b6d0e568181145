"""A training step and what it leaves behind. `trainer.py` is the place to start reading."""
