"""Model files to sharded parameters: Hugging Face folders, hub ids, GGUF files, their tokenizers."""
