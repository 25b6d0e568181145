"""The small world of the quickstart: drawn images, autoencoder, classifier and routing statistics."""
