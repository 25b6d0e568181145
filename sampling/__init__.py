"""Images from a trained model, at any budget, with an account of what they cost. Start at generate.py."""
