"""What papers that build on this repository may look like: modules for --import, and programs."""
