"""Where samples come from: records in files, and the kinds of conversation built from them."""

from metamorph_jax.data.sources.base import ImageRef, Sample
from metamorph_jax.data.sources.records import RecordSource, open_records

__all__ = ["ImageRef", "RecordSource", "Sample", "open_records"]
