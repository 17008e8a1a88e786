"""What a network is: architectures by name, and their weight files.

Both `teacher_server/` and `student_trainer/` import this room; it knows nothing of views, wires or recipes.
"""

from models.architectures import check_name, create, init_as_bit, zero_head
from models.card import ModelCard
from models.onnx_network import OnnxNetwork
from models.weights import load, save, weights_digest

__all__ = [
    "ModelCard",
    "OnnxNetwork",
    "check_name",
    "create",
    "init_as_bit",
    "load",
    "save",
    "weights_digest",
    "zero_head",
]
