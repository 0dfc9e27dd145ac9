"""Kinds of records that MM-Interleaved is trained on: documents, images with captions, and, for
fine-tuning, conversations that are changed by chance."""

from metamorph_jax.data.sources import documents
from metamorph_jax.recipes.mm_interleaved import tuning_sources

KINDS = {**documents.KINDS, **tuning_sources.KINDS}
