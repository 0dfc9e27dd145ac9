"""Kinds of records that LLaVA is trained on besides the common ones: none so far."""

KINDS = {}
