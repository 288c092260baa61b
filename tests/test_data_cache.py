"""Decoded data and downloads: once a node, however many processes ask at once."""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np

from trainables.datasets.cache import cached, fetch

CONTENT = b"published once"
PROCESSES = 4


def in_processes(work, *arguments) -> list:
    """What `work(arguments)` returns in each of several processes that begin it at the same time."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(PROCESSES), context.Queue()

    def begin() -> None:
        barrier.wait(30)
        answers.put(work(*arguments))

    processes = [context.Process(target=begin) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    return found


def decode(folder: Path) -> float:
    def build() -> dict[str, np.ndarray]:
        with open(folder / "builds", "a") as file:
            file.write(f"{os.getpid()}\n")
        return {"x": np.arange(200_000.0)}

    return float(cached(folder / "cache", "set", [folder / "source"], build)["x"].sum())


def test_a_set_is_decoded_once_for_all_processes_of_a_node(tmp_path):
    (tmp_path / "source").write_bytes(b"raw")
    assert in_processes(decode, tmp_path) == [sum(range(200_000))] * PROCESSES
    assert len((tmp_path / "builds").read_text().splitlines()) == 1


def test_a_file_is_downloaded_once_for_all_processes_of_a_node(tmp_path):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/data.bin"
    known = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    paths = in_processes(lambda: str(fetch(tmp_path, url, known, "data")))
    server.shutdown()
    assert len(set(paths)) == 1
    assert Path(paths[0]).read_bytes() == CONTENT
    assert len(asked) == 1
