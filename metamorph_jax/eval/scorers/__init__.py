"""Scoring rules of benchmarks as pure functions, one file per family."""
