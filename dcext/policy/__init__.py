"""Decides where each weight rests and how it is stored, from what a machine was measured to do."""
