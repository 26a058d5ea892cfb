"""Facts about a corpus: findings, counts and splits. It imports audio, features, files and the modules of data/."""
