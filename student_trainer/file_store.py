"""Logits in a file: one record of fixed size a sample, at sample * size. `FOLDER/KEY.logits`, with KEY.json for people.

Processes that write different samples do not disturb each other, also on several machines where the folder is shared.
Records are read through a memory map and written by `pwrite`: a full disk is then an error, and not the end of the
process by SIGBUS. A kill in the middle of a write leaves a damaged record, which its checksum shows.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from student_trainer.logit_store import Counts, StoreGoneError, StoreKey, pack_records, unpack_records


class FileStore:
    """A dense array of packed values. Implements LogitStore."""

    def __init__(self, folder: str | Path, key: StoreKey) -> None:
        """Open the file of this key, and make it if need be: it is sparse, and grows as it is filled.

        Raises:
            StoreGoneError: the folder cannot be written, or the file is not of this key's size.
        """
        self.counts = Counts()
        self._key = key
        self.path = Path(folder) / f"{key.digest}.logits"
        num_bytes = key.num_samples * key.value_bytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self._create(num_bytes)
            self._file = os.open(self.path, os.O_RDWR)
            size = os.fstat(self._file).st_size
            if size != num_bytes:
                os.close(self._file)
                raise StoreGoneError(
                    f"{self.path} has {size} bytes, {key.num_samples} values need {num_bytes}: it was cut, or is "
                    "no store. Delete it, and it will be filled anew"
                )
            shape = key.num_samples, key.value_bytes
            self._records = np.memmap(self.path, dtype=np.uint8, mode="r", shape=shape)
        except OSError as error:
            raise self._gone(error) from error

    def get(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """See LogitStore."""
        return unpack_records(self._key, samples, self._records[samples], self.counts)  # a copy: checked, then read

    def put(self, samples: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """See LogitStore."""
        try:
            for sample, value in zip(samples.tolist(), pack_records(self._key, samples, logits), strict=True):
                if os.pwrite(self._file, value, sample * len(value)) != len(value):
                    raise OSError(errno.ENOSPC, "only a part was written", str(self.path))
                self.counts.written += 1
        except OSError as error:
            raise self._gone(error) from error

    def close(self) -> None:
        """See LogitStore."""
        os.close(self._file)

    def _create(self, num_bytes: int) -> None:
        """Several processes may do so at once: the first file to get the name stays."""
        partial = self.path.with_name(f".{self.path.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.truncate(num_bytes)
            facts = self.path.with_suffix(".json")
            facts.write_text(json.dumps(self._key.facts(), indent=1) + "\n", encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _gone(self, error: OSError) -> StoreGoneError:
        return StoreGoneError(
            f"the logit store {self.path} cannot be used: {error}. Make room or give write access, or choose another "
            "folder (--teacher.store)"
        )
