"""Kinds of records that MM-Interleaved is trained on: documents, and images with captions."""

from metamorph_jax.data.sources import documents

KINDS = documents.KINDS
