"""The store of teacher states: `from stillhouse.extract.store import Store`.

May import data/errors.py and data/files/. It never imports torch or transformers.
"""

from .disk.layout import hash_text, to_float32
from .format.plan import TeacherInfo
from .gather import Gathered
from .reader import Store
from .views import View

__all__ = ["Gathered", "Store", "TeacherInfo", "View", "hash_text", "to_float32"]
