"""Official files of the sets that MM-Interleaved is fine-tuned on, as rows of JSON lines.

    python -m metamorph_jax.recipes.mm_interleaved.prepare vqav2 --from data/vqav2 --to vqav2.jsonl

Rows are conversations, which every recipe reads: what a user's turn says is given, what the
assistant's says is learnt. Those that are changed by chance in training are of kind `augmented`
(`tuning_sources.py`).
"""
