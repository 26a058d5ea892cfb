"""The store of teacher states: `from stillhouse.extract.store import Store`. Imports neither torch nor transformers."""

from .disk.layout import hash_text, to_float32
from .gather import Gathered
from .reader import Store, TeacherInfo
from .views import View

__all__ = ["Gathered", "Store", "TeacherInfo", "View", "hash_text", "to_float32"]
