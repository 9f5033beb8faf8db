"""Readers that turn what a user has (ARC tasks, rows of JSON, CSV and Parquet, text files, Hugging Face datasets)
into a stream of `Sample`, and the plan that cuts the stream into batches. Start at `sources.open_source`;
nothing here reads a model, and everything read is JSON, CSV, text, Arrow or Parquet: nothing is unpickled.
"""
