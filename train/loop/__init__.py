"""The training loop. May import `train.run`, `train.decode`, `train.score` and what those may import."""
