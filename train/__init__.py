"""Train, decode, score and export a transducer. May import `distill`, `extract.store` and `data`."""
