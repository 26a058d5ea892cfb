"""N-gram models made here: counting and smoothing, their files, and the weights to decode with."""
