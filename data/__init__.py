"""Images to latents: image folders, the embedded data set, the autoencoder and the feature store."""
