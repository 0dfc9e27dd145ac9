"""Foreign checkpoints in and out: Hugging Face, GGUF, ONNX."""
