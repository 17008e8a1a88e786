"""The forward pass on CUDA: recorded once with its one shape, and replayed, while the next batch is on its way.

Two streams of our own, and the default one is left to those who render. On `side` a batch's pixels cross as uint8,
through pinned memory, and are mixed; on `main` they enter the network's fixed input, the recorded pass is replayed, and
the logits leave into pinned memory. So a batch can be begun while the one before it is still running, and Python is
asked for nothing between two kernels.

Rejected: torch.compile's own graphs (mode "reduce-overhead"). They belong to the thread that made them, and a teacher
is loaded by one thread and run by another. Rejected: logits as float16 across the bus. Averages over views are taken
in float32 (service.py), and 1000 classes of 128 rows cross in 20 us.

Not measured: written without a GPU.

Legend: R rows, K classes, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_server import events

_WARM_UPS = 2  # the first compiles and loads kernels, the second allocates as all others will


class Replay:
    """A network's forward pass for batches of one shape. One thread at a time."""

    def __init__(self, forward: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Warm up, and record.

        Args:
            forward: the network on its device, of the kind that takes what `shape` and `dtype` say.
            shape: of the padded batch.
            dtype: of the network's input.
            device: where it is.
        """
        self._main, self._side = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._device = device
        self._forward = forward
        self._main.wait_stream(torch.cuda.current_stream(device))  # the weights may still be on their way
        with torch.cuda.stream(self._main):
            self._input = torch.zeros(tuple(shape), dtype=dtype, device=device).contiguous(
                memory_format=torch.channels_last
            )
            for _ in range(_WARM_UPS):
                self._output: torch.Tensor = forward(self._input)
        self._main.synchronize()
        self._graph = self._recorded()

    def logits(self, rows_NCHW: torch.Tensor) -> torch.Tensor:
        """Float32 [R, K] on the device, of mixed rows, in the order of the current stream."""
        caller = torch.cuda.current_stream(self._device)
        self._main.wait_stream(caller)
        with torch.cuda.stream(self._main):
            logits = self._run([rows_NCHW.to(self._device)]).float().clone()
        logits.record_stream(caller)  # or the main stream may take its memory while the caller still reads it
        caller.wait_stream(self._main)
        return logits

    def begin(self, prepare: Callable[[], Sequence[torch.Tensor]]) -> Callable[[], NDArray[np.float32]]:
        """Put a batch on its way; what is returned waits for its logits, [R, K].

        Args:
            prepare: uploads and mixes rows, [R, 3, S, S] in all, on the stream that is current when it is called. What
                it holds is kept until the device has read it.
        """
        with torch.cuda.stream(self._side):
            self._side.wait_stream(torch.cuda.default_stream(self._device))  # that is where views are rendered
            rows = [part.to(self._input.dtype) for part in prepare()]
        self._main.wait_stream(self._side)
        with torch.cuda.stream(self._main):
            output = self._run(rows).float()
            logits = torch.empty(output.shape, dtype=torch.float32, pin_memory=True)
            logits.copy_(output, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the core is the decoders'
            done.record(self._main)
        # Freed earlier, their memory would be taken by the next batch while this one's kernels still read it.
        kept = [(prepare, rows)]

        def wait() -> NDArray[np.float32]:
            done.synchronize()
            kept.clear()
            return logits.numpy()

        return wait

    def _run(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The network's output for rows, padded with zeros, on the current stream; the next run overwrites it."""
        num_rows = 0
        for part in rows:
            self._input[num_rows : num_rows + len(part)].copy_(part)
            num_rows += len(part)
        self._input[num_rows:].zero_()
        if self._graph is None:
            self._output = self._forward(self._input)
        else:
            self._graph.replay()
        return self._output[:num_rows]

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on with what they do on the device.
            with torch.cuda.graph(graph, stream=self._main, capture_error_mode="thread_local"):
                self._output = self._forward(self._input)
        except RuntimeError as error:  # a network that asks the CPU for something on its way
            events.event("not_recorded", reason=str(error))
            return None
        return graph
