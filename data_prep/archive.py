"""Where the bytes of a data set are: every picture is a range of bytes in some file.

A picture file in a folder, a member of a tar, a member of a tar inside a tar: all of them are
(file, offset, size), so any worker process reads any picture with one `pread`, and nothing is unpacked.
Only a compressed tar has no such ranges; it is decompressed once, beside the output, and removed after.

Not here: what the names mean (layouts.py).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_COMPRESSED = (".tgz", ".tar.gz")


class Stored(NamedTuple):
    """A file, wherever it lies."""

    name: str
    """Path inside its archive or folder, with `/`."""
    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its contents.

        Raises:
            OSError: the file that holds it is gone or shorter than it was.
        """
        with Path(self.file).open("rb") as stream:
            stream.seek(self.offset)
            contents = stream.read(self.size)
        if len(contents) != self.size:
            raise OSError(f"{self.name} should be {self.size} bytes of {self.file}, which has become shorter")
        return contents

    def text(self) -> str:
        """Its contents as UTF-8 text."""
        return self.read().decode("utf-8")

    @property
    def is_picture(self) -> bool:
        """Whether the name is a picture's. Hidden files are not: macOS leaves `._a.jpg` in archives."""
        return self.name.lower().endswith(PICTURE_SUFFIXES) and not Path(self.name).name.startswith(".")


class Source:
    """The folder somebody downloaded a data set into, with room to decompress archives."""

    def __init__(self, root: Path, scratch: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"the source {root} is not a folder")
        self.root = root
        self._scratch = scratch

    def find(self, *names: str) -> Path | None:
        """The first of these names that exists in the source, or in one of its subfolders."""
        bases = [self.root, *sorted(path for path in self.root.iterdir() if path.is_dir())]
        found = (base / name for name in names for base in bases if (base / name).exists())
        return next(found, None)

    def get(self, *names: str) -> Path:
        """As `find`, but one of them must be there."""
        found = self.find(*names)
        if found is None:
            raise FileNotFoundError(f"{self.root} holds none of: {', '.join(names)}")
        return found

    def members(self, *names: str) -> list[Stored]:
        """The files of the first of these folders or archives that exists.

        Names start with the folder's own name, as they do in the archive of that folder.
        """
        found = self.get(*names)
        if found.is_dir():
            return [stored._replace(name=f"{found.name}/{stored.name}") for stored in files_below(found)]
        return list(members_of_tar(self._plain(found)))

    def fingerprint(self) -> str:
        """SHA-256 over names and sizes of all files: cheap, and different when the source is another one."""
        listing = "".join(f"{stored.name}\0{stored.size}\n" for stored in files_below(self.root))
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def _plain(self, archive: Path) -> Path:
        if not archive.name.endswith(_COMPRESSED):
            return archive
        self._scratch.mkdir(parents=True, exist_ok=True)
        plain = self._scratch / f"{archive.name}.tar"
        try:
            with gzip.open(archive) as packed, plain.open("wb") as stream:
                shutil.copyfileobj(packed, stream, 1 << 20)
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{archive} is damaged ({error}); download it again") from error
        return plain


def files_below(folder: Path) -> list[Stored]:
    """All files below a folder, sorted by name, hidden ones left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if not name.startswith("."):
                found.append(Stored(path.relative_to(folder).as_posix(), str(path), 0, path.stat().st_size))
    return sorted(found)


def members_of_tar(file: Path, start: int = 0) -> Iterator[Stored]:
    """The regular files in an uncompressed tar that begins at byte `start` of `file`, in their order.

    Raises:
        ValueError: it is not an uncompressed tar, or it ends too early.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        yield Stored(member.name, str(file), member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{file} is not a whole, uncompressed tar ({error}); download it again") from error


def one(members: Sequence[Stored], tail: str) -> Stored:
    """The member whose path ends with `tail`.

    Raises:
        ValueError: there is none.
    """
    for member in members:
        if f"/{member.name}".endswith(f"/{tail}"):
            return member
    where = members[0].file if members else "an empty archive"
    raise ValueError(f"no {tail} found beside {where}; is this the official archive?")
