"""A forward that is looked into: edits, logits, log-probabilities of answers, gradients. Everything is values in and out."""
