"""From stored weights to effective weights: pruning and quantisation."""
