"""Archives as the wild has them, prepared in this process; and what came out, by key."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io

from data_prep.index import Index
from data_prep.prepare import prepare


def make(name: str, source: Path | None, out: Path, **options) -> Index:
    """Prepare in this process, without a bar."""
    return prepare(name, source, out, **({"workers": 1, "progress": False} | options))


def keys(index: Index, split: str) -> list[str]:
    return [index.key[row].decode() for row in index.splits[split]]


def labels(index: Index) -> dict[str, int]:
    return {key.decode(): int(label) for key, label in zip(index.key, index.label, strict=True)}


def picture(index: Index, key: str) -> bytes:
    return index.read(np.flatnonzero(index.key == key.encode()))[0].tobytes()


def tar_of(files: dict[str, bytes], compress: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return gzip.compress(buffer.getvalue(), 1) if compress else buffer.getvalue()


def mat(**arrays) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    return buffer.getvalue()
