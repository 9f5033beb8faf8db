"""Answers: greedy and sampled decoding on a mesh, and what becomes of the answers to ARC tasks."""
