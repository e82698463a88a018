"""Folders of .npy arrays that are written whole or not at all, and memory-mapped when read."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from stem_fast.common import DataError

META = "meta.json"
DAY = 24 * 3600.0
NAME = re.compile("[0-9a-f]{40}")  # of an entry that ``data.load`` makes


def cache_root(cache: str | Path | None = None) -> Path:
    """The folder of all entries: ``cache``, else $STEM_FAST_CACHE, else $XDG_CACHE_HOME/stem_fast,
    else ~/.cache/stem_fast."""
    if cache or (cache := os.environ.get("STEM_FAST_CACHE")):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stem_fast"


def read_entry(entry: Path) -> dict[str, np.ndarray] | None:
    """Map the arrays of an entry; None when there is none or it is damaged.

    Every byte is held against a checksum: an id that a disk has changed would be outside its
    vocabulary, or another one.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        held = _Held(entry)
        checksums = json.loads((entry / META).read_text())
        if {f"{name}.npy" for name in checksums} != {file.name for file in entry.glob("*.npy")}:
            return None
        for name, checksum in checksums.items():
            file = entry / f"{name}.npy"
            if _checksum(file) != checksum:
                return None
            # Mode "c" gives private pages: torch warns about memory that it may not write.
            arrays[name] = np.load(file, mmap_mode="c", allow_pickle=False)
            arrays[name].held = held  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # of a cache that this user may only read
            os.utime(entry)
    except (OSError, ValueError, AttributeError, TypeError, EOFError, RecursionError):
        return None
    return arrays or None


class _Held:
    """A shared lock on a folder, as long as this object lives (or its process does)."""

    def __init__(self, folder: Path) -> None:
        self.file = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self.file, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(self.file), os.stat(folder)):
            raise FileNotFoundError(f"{folder} was removed")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.file)


class Entry(NamedTuple):
    """One data set in the cache."""

    path: Path
    size: int  # bytes
    used: float  # when it was last read or made, in seconds since 1970


def entries(root: Path) -> list[Entry]:
    """What ``root`` holds, that longest unused first; other files and folders are not looked at."""
    found = []
    for path in root.glob("*") if root.is_dir() else ():
        if NAME.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process removes it
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(Entry(path, size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def evict(root: Path, limit: float) -> list[Entry]:
    """Remove entries, that longest unused first, until at most ``limit`` bytes are left, and return
    them. What a process has open, here or elsewhere, stays, whatever the limit. What killed
    processes left is removed too."""
    _sweep(root, rf"\.{NAME.pattern}\..*")
    found, removed = entries(root), []
    total = sum(entry.size for entry in found)
    for entry in found:
        if total <= limit:
            break
        if _remove(entry.path):
            removed.append(entry)
            total -= entry.size
    return removed


def _remove(folder: Path) -> bool:
    """Whether the folder could be removed: not while it is held."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # In one step out of every reader's sight.
        away = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
        os.rename(folder, away)
        shutil.rmtree(away, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _sweep(root: Path, name: str) -> None:
    """Remove the folders of that name (a pattern) that killed processes left: they are never read,
    and a day later they are surely nobody's work."""
    for left in root.glob(".*") if root.is_dir() else ():
        with contextlib.suppress(OSError):  # another process sweeps too
            if re.fullmatch(name, left.name) and time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)


def _checksum(file: Path) -> int:
    return zlib.crc32(np.memmap(file, np.uint8, "r").data)


@contextlib.contextmanager
def write_entry(entry: Path) -> Iterator[Writer]:
    """A writer whose arrays become the entry, in one rename, when the block ends well.

    Otherwise nothing is left. A damaged entry is replaced; where another process has made the
    entry meanwhile, that one stays: entries of one name have the same content.
    Raises DataError where the folder cannot be written.
    """
    prefix = f".{entry.name}."
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _sweep(entry.parent, f"{re.escape(prefix)}.*")
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent))
        try:
            with Writer(temporary) as writer:
                yield writer
            checksums = {file.stem: _checksum(file) for file in temporary.glob("*.npy")}
            (temporary / META).write_text(json.dumps(checksums))
            if read_entry(entry) is None:
                shutil.rmtree(entry, ignore_errors=True)
                os.rename(temporary, entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if read_entry(entry) is None:  # else the race to the name was lost between check and rename
            raise DataError(
                f"{entry.parent}: cannot write the cache ({error.strerror}): set STEM_FAST_CACHE "
                "to another folder."
            ) from error


class Writer:
    """Appends rows to .npy files whose length is known only at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, BinaryIO] = {}
        self.heads: dict[str, dict[str, Any]] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows to the array ``name``; the first call settles its dtype and other sizes."""
        if name not in self.files:
            self.files[name] = (self.folder / f"{name}.npy").open("wb")
            shape = (0, *rows.shape[1:])
            self.heads[name] = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self.files[name], self.heads[name])
        length, *sizes = self.heads[name]["shape"]
        self.heads[name]["shape"] = (length + len(rows), *sizes)
        self.files[name].write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for name, file in self.files.items():
            with file:
                # numpy pads headers so that the first size can grow: the length stays the same.
                file.seek(0)
                np.lib.format.write_array_header_1_0(file, self.heads[name])
