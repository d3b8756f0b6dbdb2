"""From files to batches: corpus, tokenizer, store, mixture, packing, loader.

A batch is a function of (seed, step).
"""
