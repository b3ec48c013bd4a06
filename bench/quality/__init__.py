"""What compression costs in quality: perplexity and divergence over stored bits, dcext beside its peers."""
