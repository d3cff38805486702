"""A run against another: the same tokens, routed by two models, checkpoints or plans."""
