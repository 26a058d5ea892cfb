"""Entries of a list of audio: a file, a pipe or a place in an archive. It imports audio, files and sources.common."""
