"""Training on activations that are never stored: they stay on the devices that computed them."""
