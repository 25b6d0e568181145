"""What is done with a trained model: samples, pictures of the chunking, and what it costs."""
