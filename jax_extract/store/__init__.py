"""Runs on disk or in a bucket: shard formats, commit records, the writer, the upload and the reader."""
