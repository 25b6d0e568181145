"""Pictures for people; the only package that imports matplotlib."""
