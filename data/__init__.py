"""Images to latents: image folders, the autoencoder and the feature store."""
