"""From files to batches: corpus, tokenizer, token shards, mixture, packing, loader.

A batch is a function of (seed, step).
"""
