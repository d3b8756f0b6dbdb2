"""Whether a recipe trains the same on every layout, and loses nothing when interrupted."""
