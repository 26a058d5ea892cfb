"""Rows, shard files and memory for the reader. May import format/ and what is below it."""
