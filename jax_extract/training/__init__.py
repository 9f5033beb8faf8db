"""Training of small language models in JAX: a dataset of walks in, Hugging Face folders out."""
