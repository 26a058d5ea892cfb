"""Looking into a store: facts as dataclasses, their renderings apart. Imports neither torch nor zarr nor click."""
