"""From weights as stored to weights as used: pruning and quantisation."""
