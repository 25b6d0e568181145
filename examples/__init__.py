"""Modules that --import takes: what a paper that builds on this repository may look like."""
