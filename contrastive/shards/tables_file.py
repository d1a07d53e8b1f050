"""Several numpy arrays in one file that is mapped into memory: opening costs the same however large they are."""

import os
import tokenize
import uuid
from pathlib import Path

import numpy as np

ALIGNMENT = 64


def save_tables(path: Path, fingerprint: str, tables: dict[str, np.ndarray]) -> None:
    """Write the arrays aside, then by one rename. fingerprint: what they belong to, see `load_tables`."""
    # Not the process's number: on a folder shared by containers, each of them is number 1.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            names = np.array([fingerprint, *tables])
            for array in (names, *tables.values()):
                file.write(bytes(-file.tell() % ALIGNMENT))
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tables(path: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    """The arrays, read-only; None for a file that is absent, damaged, cut off or of another fingerprint."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            version = np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if version != (1, 0) or len(shape) != 1 or dtype.kind != "U" or dtype.itemsize * shape[0] > length:
                return None
            words = np.frombuffer(file.read(dtype.itemsize * shape[0]), dtype).tolist()
            if words[0] != fingerprint:
                return None
            tables = {}
            for name in words[1:]:
                file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                size = int(np.prod(shape)) * dtype.itemsize
                if dtype.hasobject or file.tell() + size > length:
                    return None
                # A plain view: indexing a np.memmap costs several times as much.
                start = file.tell()
                mapped = np.memmap(path, dtype, "r", start, shape) if size else np.empty(shape, dtype)
                tables[name] = mapped.view(np.ndarray)
                file.seek(start + size)
            return tables
    except (OSError, ValueError, EOFError, IndexError, SyntaxError, TypeError, MemoryError, tokenize.TokenError):
        return None  # numpy reads its headers as Python literals, and tells of damage in all these ways
