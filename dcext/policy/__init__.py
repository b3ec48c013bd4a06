"""Decides where each weight is kept and how it is stored, from what a machine was measured to do."""
