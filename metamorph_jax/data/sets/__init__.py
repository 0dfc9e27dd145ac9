"""Data sets that are trained on and evaluated with, as they are published."""
