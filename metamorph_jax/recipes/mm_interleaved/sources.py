"""Kinds of records of MM-Interleaved's own: none yet."""

KINDS: dict = {}
