"""A teacher that is an ONNX file: onnxruntime computes it, and it looks like any other network from outside.

An ONNX file is a graph of known operations and runs no code of its own, unlike a pickle. It is served in its own
precision. What must be known to feed it (mean, std, size) stands in the metadata of files that funmatch wrote; of
others it is told by whoever serves it. One thing is read from the graph: input [N, 3, S, S], output [N, K].

Rejected: TorchScript files. torch has ended their development, their operators may read and write files, and whoever
has one has the network that it came from, which can be written as .safetensors or ONNX. Rejected: converting ONNX to
torch modules. No converter that is kept covers more than a part of the operations.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.card import HEADER, ModelCard, Triple

SUFFIX = ".onnx"
_FLOAT = "tensor(float)"
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxNetwork(nn.Module):
    """Rows in, logits out. It has no parameters; a digest of its file stands for them."""

    file_sha256: torch.Tensor

    def __init__(self, path: Path) -> None:
        """Open the file and look at its doors."""
        super().__init__()
        self._path = path
        self._session: Any = open_session(path, [_CPU])
        self.input_shape, self.num_classes = _doors(self._session, path)
        digest = hashlib.sha256(path.read_bytes()).digest()
        self.register_buffer("file_sha256", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def run_on(self, device: torch.device) -> None:
        """Compute on this device from now on; not measured on a GPU.

        Raises:
            ValueError: this onnxruntime cannot.
        """
        import onnxruntime  # type: ignore[import-untyped]

        if device.type == "cpu":
            return
        if _CUDA not in onnxruntime.get_available_providers():
            raise ValueError(
                f"{self._path} cannot be served on {device}: this onnxruntime is the one for CPUs. Install "
                "onnxruntime-gpu in its place, or serve with --device cpu"
            )
        # TF32 off: float32 means float32, as everywhere else here.
        options = {"device_id": str(device.index or 0), "use_tf32": "0"}
        self._session = open_session(self._path, [(_CUDA, options)])

    def forward(self, rows_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] on the rows' device."""
        rows = rows_NCHW.detach().float().cpu().contiguous().numpy()
        name = self._session.get_inputs()[0].name
        return torch.from_numpy(self._session.run(None, {name: rows})[0]).to(rows_NCHW.device)

    @property
    def batch_rows(self) -> int | None:
        """The only size of a batch that the file takes; None: any."""
        rows = self.input_shape[0]
        return rows if isinstance(rows, int) and rows > 0 else None

    def card(self) -> ModelCard | None:
        """What the file says of itself; None if it is not one of ours.

        Raises:
            ValueError: it says what cannot be.
        """
        header = self._session.get_modelmeta().custom_metadata_map.get(HEADER)
        return None if header is None else ModelCard.from_json(header, self._path)

    def __deepcopy__(self, memo: object) -> OnnxNetwork:
        return OnnxNetwork(self._path)


def load(path: Path, mean: Triple | None, std: Triple | None, size: int | None) -> tuple[OnnxNetwork, ModelCard]:
    """The network of an ONNX file and its card; what is given goes before what the file says.

    Raises:
        ValueError: not an ONNX classifier of pictures, or something must be known that neither says.
    """
    network = OnnxNetwork(path)
    own = network.card()
    side = network.input_shape[2]
    size = size or (own.size if own else side if isinstance(side, int) else None)
    mean, std = mean or (own.mean if own else None), std or (own.std if own else None)
    wanted = {
        "--mean R G B --std R G B (on the scale 0..1; ImageNet's are 0.485 0.456 0.406 and 0.229 0.224 0.225; where "
        "the file normalises by itself, 0 0 0 and 1 1 1)": mean is None or std is None,
        "--size PIXELS": size is None,
    }
    if any(wanted.values()):
        missing = " and ".join(flag for flag, lacks in wanted.items() if lacks)
        raise ValueError(f"{path} does not say how pictures are fed to it: give {missing}")
    assert mean is not None and std is not None and size is not None
    if isinstance(side, int) and size != side:
        raise ValueError(f"{path} takes pictures of {side} pixels and no others: leave out --size {size}")
    if own and own.num_classes != network.num_classes:
        raise ValueError(f"{path} has {network.num_classes} outputs, and its card says {own.num_classes} classes")
    card = own or ModelCard(architecture="onnx", num_classes=network.num_classes, size=size, mean=mean, std=std)
    return network, dataclasses.replace(card, size=size, mean=mean, std=std)


def open_session(path: Path, providers: Sequence[Any]) -> Any:
    """An onnxruntime session on the threads that torch has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: onnxruntime is missing, or cannot read the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such ONNX file: {path}")
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{path} needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to others
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # its own kinds, of which each version has others
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: onnxruntime cannot read it: {reason}") from error


def _doors(session: Any, path: Path) -> tuple[list[int | str | None], int]:
    """(the input's shape, the number of classes); the batch may have any name, or a fixed number."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] != 3 or not _square(shape) or inputs[0].type != _FLOAT:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise ValueError(
            f"{path}: a teacher has one input of float32 pictures [N, 3, S, S], channels first; this file's are {found}"
        )
    out = outputs[0].shape if len(outputs) == 1 else []
    if len(out) != 2 or not isinstance(out[1], int) or outputs[0].type != _FLOAT:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in outputs)
        raise ValueError(f"{path}: a teacher has one output of float32 logits [N, classes]; this file's are {found}")
    return list(shape), out[1]


def _square(shape: Sequence[int | str | None]) -> bool:
    """Of sides that are not fixed, nothing is known; their names may differ."""
    return not (isinstance(shape[2], int) and isinstance(shape[3], int)) or shape[2] == shape[3]
