"""From a trained model to text and pictures."""

WEIGHTS = ("auto", "float32", "bfloat16", "int8")  # how decoding keeps them, see `layers.layout`
