"""Weights that rest elsewhere than where they are used, and how they travel."""
