"""The decoder: parameters, forward pass, attention and loss."""
