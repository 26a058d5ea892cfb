"""Error rates of hypotheses, by group, with alignments and tests of differences. Imports data and nothing of train."""
