"""Change whole stores: copy, merge, delete from, repair and import them.

Modules here may import `extract.pipeline`, `extract.teacher`, `extract.store` and `data`.
"""
