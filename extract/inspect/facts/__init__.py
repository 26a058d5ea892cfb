"""What a store contains, as dataclasses without text. May import `extract.store`, `extract.maintain` and `data`."""
