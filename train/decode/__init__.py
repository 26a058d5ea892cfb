"""Greedy and beam search, n-gram fusion and forced alignment. Imports data, train.model and train.score."""
