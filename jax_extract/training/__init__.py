"""What every training here shares: when it logs, evaluates and saves; whole checkpoints; going on from them."""
