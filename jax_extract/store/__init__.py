"""Shards on disk: formats, durable create-only files, commit records, the writer and the reader."""
