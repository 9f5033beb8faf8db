"""Walks on graphs, and small language models that are trained on them."""
