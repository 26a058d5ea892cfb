"""Audio in and features out: files, pipes, resampling and fbank. It imports data/errors.py and files."""
