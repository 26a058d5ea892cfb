"""Several workers on one store: processes of this machine, or tasks of a Ray cluster."""

from .local import parse_part, part_of, share_threads, start_workers
from .on_ray import start_ray_workers

__all__ = ["parse_part", "part_of", "share_threads", "start_ray_workers", "start_workers"]
