"""What a network is: architectures by name, and their weight files.

Both `teacher_server/` and `student_trainer/` import this room; it knows nothing of views, wires or recipes.
"""

from models.architectures import check_name, create, init_as_bit, zero_head
from models.weights import ModelCard, load, save, weights_digest

__all__ = ["ModelCard", "check_name", "create", "init_as_bit", "load", "save", "weights_digest", "zero_head"]
