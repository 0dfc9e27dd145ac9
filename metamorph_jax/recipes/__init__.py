"""Recipes: a model composed for a purpose, its losses, and what each stage trains."""
