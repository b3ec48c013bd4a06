"""Recipes, each in a file that registers it."""
