"""Corpora, audio, features, ASR units and batches. It imports nothing else of the package."""
