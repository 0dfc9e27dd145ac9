"""Instruction data that a language model writes about images: `metamorph data generate`."""
