"""What columns of tables and keys of lists mean: times, channels, ids from file names. It imports data/errors.py."""
