"""What is computed from states, as dataclasses without text. May import `inspect.facts`, `extract.store` and `data`."""
