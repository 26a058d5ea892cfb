"""Importers: one for each kind of corpus. They import audio, files, corpus.check and the modules of data/."""
