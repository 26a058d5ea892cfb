"""The language model, and the windows of text that go through it. Imports the store and `data`; loads torch."""

from .model import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]
