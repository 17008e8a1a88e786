"""A student as one ONNX file: float32 pictures in, logits out, any number of rows.

    input   images   float32 [N, 3, S, S], scaled to 0..1, less mean, over std
    output  logits   float32 [N, K]

What must be known to use it stands in the file's metadata, under the name that a teacher looks for
(models/onnx_network.py): an exported student can teach. Standardised weights are folded before.

Rejected: scaling and normalising inside the graph. Every tool that feeds an ONNX classifier does it already, and twice
is wrong in a way that shows late.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models import ModelCard
from models.card import HEADER
from models.onnx_network import open_session
from teacher_server.frozen import fold_standardisation

FILE = "model.onnx"
INPUT, OUTPUT = "images", "logits"


def write(path: Path, model: nn.Module, card: ModelCard) -> None:
    """Write the network as `path`; weights beyond 2 GB go to a file beside it, whose name torch chooses.

    Raises:
        ValueError: the packages of the extra `export` are missing, or the network cannot be written.
    """
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it, and says so in a page of text
    except ImportError as error:
        raise ValueError("ONNX needs packages that are not here: pip install 'funmatch[export]'") from error
    plain = copy.deepcopy(model).cpu().float().eval()
    fold_standardisation(plain)
    example = torch.zeros(2, 3, card.size, card.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations, inside its exporter
        try:
            program = torch.onnx.export(
                plain, (example,), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"torch cannot write {card.architecture} as ONNX: {reason}") from error
    assert program is not None
    program.model.metadata_props[HEADER] = card.to_json()
    program.save(path)


def answers(path: Path, images_N3SS: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the file says of pictures, by onnxruntime on the CPU: float32 [N, K]; once in one batch, and once alone.

    Raises:
        ValueError: a picture is answered otherwise when it is alone.
    """
    session = open_session(path, ["CPUExecutionProvider"])
    together: NDArray[np.float32] = session.run([OUTPUT], {INPUT: images_N3SS})[0]
    alone = session.run([OUTPUT], {INPUT: images_N3SS[:1]})[0]
    spread = float(together.max() - together.min())
    if not np.allclose(together[:1], alone, rtol=0, atol=1e-3 * max(spread, 1e-6)):
        raise ValueError(f"{path} answers a picture otherwise when it is alone: it looks at its batch-mates")
    return together
