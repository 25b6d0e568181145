"""The small world that ships with the repository: data set, autoencoder, classifier and a check of the routing."""
