"""Files of weights: checkpoints, foreign weights, and models made from others. Start at checkpoint.py."""
