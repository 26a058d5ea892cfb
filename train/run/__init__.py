"""What a run keeps: folder, checkpoints, metrics, ranks. May import `train.model` and what that may import."""
