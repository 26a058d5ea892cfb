"""Stores in an object store: requests, cache, files. May import disk/ and data/."""
