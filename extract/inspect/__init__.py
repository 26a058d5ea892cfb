"""Look into a store. May import `extract.store`, `extract.maintain` and `data`; imports neither torch nor zarr."""
