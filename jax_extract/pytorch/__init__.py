"""The PyTorch path: extraction by forward hooks with the plan, the names, the shards and the reader of every run."""
