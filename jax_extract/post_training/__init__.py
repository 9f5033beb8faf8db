"""Representations of trained models and of what they were trained from, task by task (phase 3)."""
