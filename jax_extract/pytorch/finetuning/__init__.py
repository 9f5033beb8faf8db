"""Fine-tuning decoders on the benchmark tasks, whole or by LoRA, with transformers' Trainer."""
