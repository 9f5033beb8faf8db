"""Slabs that hold samples of one batch alone: of answers, and of runs that were begun before slabs crossed batches."""
