"""The parts that models are built of: parameters, products, positions, attention."""
