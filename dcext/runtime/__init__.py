"""Weights that travel while a model runs: from files and host memory to where they are multiplied."""
