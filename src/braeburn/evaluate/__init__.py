"""What a trained model is worth: generated text and held-out loss."""
