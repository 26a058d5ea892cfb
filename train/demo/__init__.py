"""The demo: stories in synthetic voices, to a trained recogniser and a report. Imports data and the rest of train."""
