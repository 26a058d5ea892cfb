"""HTML pages of runs, scores, studies and the demo. Imports data, train.run and train.score."""
