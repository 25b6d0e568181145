"""Numbers about sets of images: features, metrics, and the comparison of samples with a reference."""
