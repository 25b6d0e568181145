"""Small data sets (shapes, OpenMoji glyphs), and an autoencoder, a classifier and routing statistics for them."""
