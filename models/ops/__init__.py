"""Code that is only about speed or memory; the readable twin of each function is in models/reference.py."""
