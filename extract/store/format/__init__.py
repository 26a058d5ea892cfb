"""What a store consists of: arrays, plans, commits, index of utterances, int8. May import disk/, remote/ and data/."""
