"""What is minimised: cross-entropy and distillation over one vocabulary-parallel loop.

`vocabulary` has the loop and the contract of an objective, of which one is added as one new file;
`statistics` has what an objective can accumulate of each token.
"""
