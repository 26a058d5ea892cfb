"""The commands `extract`, `teacher`, `inspect`, `store` and `views`. May import click, `data` and all of `extract`."""
