"""Published data sets that are Python pickles, read without running what a pickle could run.

An ordinary unpickler calls whatever the file names. This one knows NumPy arrays and plain containers, and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainables.family import BadValue


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the pickle protocols of Python 2; other codecs are refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding} is not admitted")
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only NumPy arrays and containers are admitted")
        return _ADMITTED[module, name]


def read_pickle(file: IO[bytes], path: Path | str, what: str) -> Any:
    """The arrays, lists, dicts, numbers and strings that `file` holds; text of Python 2 comes as bytes.

    Args:
        file: open for reading in binary.
        path, what: for the error: where the file is and what it should be.

    Raises:
        BadValue: the file is truncated, is no pickle, or names anything but NumPy arrays.
    """
    try:
        return _ArraysOnly(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way: the user needs the file's name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadValue(f"{what}: {path} cannot be read ({reason}): download it again") from error
