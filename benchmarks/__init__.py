"""Measurements of speed and memory: `python -m benchmarks --device cpu`. Nothing else imports them."""
