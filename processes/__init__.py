"""Several processes, signals and locks. Start at group.py."""
