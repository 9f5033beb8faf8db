"""Where the computation runs: the mesh, what is laid out on it and how, defaults by platform."""
