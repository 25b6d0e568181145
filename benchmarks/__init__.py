"""Speed and memory, measured: `python -m benchmarks --device cpu`. Nothing else imports this package."""
