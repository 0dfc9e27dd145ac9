"""Scores, judges and the report."""
