"""From a trained model to text and images."""

# How decoding keeps a language model's weights, see `llm_weights`.
WEIGHTS = ("auto", "float32", "bfloat16", "int8", "nf4")
