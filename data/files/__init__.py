"""Files of any kind: atomic writes, locks, lines of text and paths. It imports data/errors.py."""
