"""From a trained model to text and images."""

WEIGHTS = ("auto", "float32", "bfloat16", "int8")  # how decoding keeps them, see `cached_llm`
