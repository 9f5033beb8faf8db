"""What the latents of a sparse autoencoder stand for: a page to look at, and the same for Neuronpedia."""
