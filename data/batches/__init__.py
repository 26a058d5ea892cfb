"""Batches: the sampler that fills them and the loader that reads them. Imports features and the modules of data/."""
