"""From a trained model to text and pictures."""
