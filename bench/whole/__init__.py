"""Whole models at batch 1: what ``bench/generation.py`` measures, and how."""
