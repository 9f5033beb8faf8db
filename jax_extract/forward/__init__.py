"""A forward that is looked into and changed: edits, logits, log-probabilities of answers, gradients."""
