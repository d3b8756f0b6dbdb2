"""The sublayers of a layer: attention and feed-forward, a module for each kind."""
