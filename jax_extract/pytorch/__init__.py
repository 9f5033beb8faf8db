"""What runs in PyTorch: extraction by forward hooks, with the plan, the names and the shards of every run; fine-tuning.

Nothing outside this folder imports torch but `verification`, for its reference.
"""
