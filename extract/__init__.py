"""Language models, their hidden states, and the stores that keep them. May import `data`."""
