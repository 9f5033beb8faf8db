"""Sparse autoencoders: trained on activations, measured, exported to what SAELens loads, and looked at."""
