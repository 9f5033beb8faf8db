"""Rows of a run in random order, for training: in which order, from where, and for JAX or torch."""
