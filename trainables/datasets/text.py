"""Text as bytes: tiny Shakespeare, WikiText-2's held-out parts, Python's own documentation, or any file.

Every set is a stream of token ids, split where it stands: the first 90% train, the last 10% are held out. Nothing is
shuffled, so that no held-out passage overlaps a training window.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainables.datasets.cache import cached, fetch, find_files
from trainables.family import BadValue

TRAIN_FRACTION = 0.9

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_HASH = "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

SHAKESPEARE_SYMBOLS = b"\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PYDOC_SYMBOLS = b"\n" + bytes(range(0x20, 0x7F))

# Typographic signs of the reference manual and their ASCII forms; whatever else is not ASCII is left out.
_ASCII = str.maketrans({"–": "-", "—": "--", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "\t": "    "})


def vocabulary(name: str, lower: bool = False) -> bytes:
    """The byte value of each token id of a set, known without reading it.

    Tiny Shakespeare has 65 symbols (39 in lower case), the documentation newline and printable ASCII (96 or 70);
    WikiText-2 and files given by path keep all 256 byte values, so that a model of them does not depend on the file.
    """
    symbols = {"shakespeare": SHAKESPEARE_SYMBOLS, "pydoc": PYDOC_SYMBOLS}.get(name)
    if symbols is None:
        return bytes(range(256))
    return bytes(sorted(set(symbols.lower()))) if lower else symbols


def load_text(name: str, data_dir: Path | None, cache_dir: Path, lower: bool = False) -> dict[str, np.ndarray]:
    """Token ids of a text.

    Args:
        name: "shakespeare" (`text/tinyshakespeare.txt`, downloaded where there is no `data_dir`), "wikitext2"
            (`text/wikitext2_valid.txt` and `text/wikitext2_test.txt`, word level with `<unk>`; it trains on the first
            90% of the validation file, holds out its last 10%, and its test file is "test"; to train on WikiText-2's
            training file give that file's path), "pydoc" (the language reference that `help()` prints, part of every
            Python), or the path of any text file.
        lower: lower-case ASCII letters first, as the notebook's data did.

    Returns:
        "train", "valid" uint8 ids; "test" too where the set has one; "vocab" uint8, byte value of each id.

    Raises:
        BadValue: a file is missing, is empty, or holds a byte outside the set's vocabulary.
    """
    if name == "pydoc":
        return _split(_documentation(), name, lower)
    if name == "shakespeare":
        if data_dir is None:
            sources = [fetch(cache_dir, SHAKESPEARE_URL, SHAKESPEARE_HASH, "tiny Shakespeare")]
        else:
            sources = find_files(data_dir, "text", ["tinyshakespeare.txt"], "tiny Shakespeare")
    elif name == "wikitext2":
        sources = find_files(data_dir, "text", ["wikitext2_valid.txt", "wikitext2_test.txt"], "WikiText-2")
    else:
        sources = [_file(name)]

    def build() -> dict[str, np.ndarray]:
        arrays = _split(sources[0].read_bytes(), name, lower)
        if len(sources) > 1:
            arrays["test"] = _encode(sources[1].read_bytes(), name, lower)
        return arrays

    kind = name if name in ("shakespeare", "wikitext2") else "file"
    return cached(cache_dir, f"text-{kind}{'-lower' if lower else ''}", sources, build)


def decode(ids: np.ndarray, vocab: np.ndarray) -> str:
    """Token ids back to text; bytes that are not UTF-8 become replacement signs."""
    return np.asarray(vocab, dtype=np.uint8)[np.asarray(ids)].tobytes().decode("utf-8", errors="replace")


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise BadValue(f"data '{name}' is neither shakespeare, wikitext2 or pydoc nor the path of a text file")
    return path


def _split(text: bytes, name: str, lower: bool) -> dict[str, np.ndarray]:
    ids = _encode(text, name, lower)
    cut = int(TRAIN_FRACTION * len(ids))
    vocab = np.frombuffer(vocabulary(name, lower), dtype=np.uint8).copy()
    return {"train": ids[:cut].copy(), "valid": ids[cut:].copy(), "vocab": vocab}


def _encode(text: bytes, name: str, lower: bool) -> np.ndarray:
    if not text:
        raise BadValue(f"the text of '{name}' is empty")
    values = np.frombuffer(text.lower() if lower else text, dtype=np.uint8)
    symbols = np.frombuffer(vocabulary(name, lower), dtype=np.uint8)
    table = np.full(256, -1, dtype=np.int16)
    table[symbols] = np.arange(len(symbols))
    ids = table[values]
    if (ids < 0).any():
        at = int(np.argmax(ids < 0))
        raise BadValue(f"the text of '{name}' has byte {values[at]} at {at}, outside its {len(symbols)} symbols")
    return ids.astype(np.uint8)


def _documentation() -> bytes:
    """The language reference as `help()` prints it, topics in alphabetical order, in ASCII.

    Read from the standard library, not shipped here: its wording follows the Python that runs, so figures on it
    compare within one Python version only.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise BadValue(
            "this Python comes without pydoc_data (its help texts): install the full standard library, or give "
            "another text with data=PATH"
        ) from error
    text = "\n\n".join(topics[topic].strip("\n") for topic in sorted(topics)) + "\n"
    folded = text.translate(_ASCII).encode("ascii", errors="ignore")
    return bytes(byte for byte in folded if byte == 10 or 32 <= byte < 127)
