"""Files of weights: checkpoints, weights of other projects, and models that start from others. Start at checkpoint.py."""
