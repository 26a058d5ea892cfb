"""The commands of training, decoding, scoring and export. May import all of `train`; nothing imports this folder."""
