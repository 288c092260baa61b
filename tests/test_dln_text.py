"""Text sets: splits, vocabularies and mistakes, on Python's own documentation and on files written here."""

from __future__ import annotations

import numpy as np
import pytest

from trainables.datasets.text import decode, load_text, vocabulary
from trainables.family import BadValue


def test_documentation_is_large_ascii_and_split_in_order(cache_dir):
    text = load_text("pydoc", None, cache_dir)
    assert len(text["vocab"]) == 96 == len(vocabulary("pydoc"))
    assert len(text["train"]) > 300_000
    assert len(text["train"]) == int(0.9 * (len(text["train"]) + len(text["valid"])))
    whole = decode(np.concatenate([text["train"], text["valid"]]), text["vocab"])
    assert "assert" in whole
    assert "The following table summarizes the operator precedence" in whole
    assert whole.isascii()


def test_lower_case_folds_the_vocabulary(cache_dir):
    upper, lower = load_text("pydoc", None, cache_dir), load_text("pydoc", None, cache_dir, lower=True)
    assert len(lower["vocab"]) == 70
    assert decode(upper["train"][:5000], upper["vocab"]).lower() == decode(lower["train"][:5000], lower["vocab"])


def test_any_file_keeps_all_byte_values(tmp_path, cache_dir):
    path = tmp_path / "my text.txt"
    path.write_bytes("Grüße, world.\n".encode() * 10)
    text = load_text(str(path), None, cache_dir)
    assert len(text["vocab"]) == 256
    together = np.concatenate([text["train"], text["valid"]])
    assert together.tobytes() == path.read_bytes()
    assert len(text["valid"]) == len(together) - int(0.9 * len(together))
    path.write_bytes(b"another")
    assert len(load_text(str(path), None, cache_dir)["train"]) == 6  # the cache follows the file


def test_mistakes_are_told_in_one_line(tmp_path, cache_dir):
    with pytest.raises(BadValue, match="neither shakespeare"):
        load_text("shakespear", None, cache_dir)
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    with pytest.raises(BadValue, match="empty"):
        load_text(str(empty), None, cache_dir)
    with pytest.raises(BadValue, match="--data-dir"):
        load_text("wikitext2", None, cache_dir)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_bytes(b"To be, or not to be %")
    with pytest.raises(BadValue, match="byte 37 at 20"):
        load_text("shakespeare", tmp_path, cache_dir)


def test_the_published_texts(data_dir, cache_dir):
    cased = load_text("shakespeare", data_dir, cache_dir)
    assert (len(cased["train"]), len(cased["vocab"])) == (1_003_854, 65)  # nanoGPT's own counts
    assert len(cased["valid"]) == 111_540
    lower = load_text("shakespeare", data_dir, cache_dir, lower=True)
    assert len(lower["vocab"]) == 39
    assert lower["train"].max() < 39
    wiki = load_text("wikitext2", data_dir, cache_dir)
    assert len(wiki["test"]) == 1_256_449
    assert "Homarus gammarus" in decode(wiki["train"][:400], wiki["vocab"])
