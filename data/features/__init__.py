"""features.h5: computed from audio in parts, written and read. It imports audio, files and the modules of data/."""
