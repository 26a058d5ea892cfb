"""Extract hidden states: from a request and a corpus to a plan, then to committed work items.

Modules here may import `extract.teacher`, `extract.store` and `data`.
"""
