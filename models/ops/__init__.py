"""Code that is only about speed or memory; models/reference.py computes the same in the plain way."""
