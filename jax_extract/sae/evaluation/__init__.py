"""How good trained sparse autoencoders are: on held-out rows, in the model, and against each other."""
