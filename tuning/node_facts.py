"""What a machine has: run on each by `tuning.doctor`, prints one JSON object. Standard library only, Python from 3.6.

Arguments, one JSON object: packages (names), head ("" or an address whose port 6379 to try), storage ("", a folder, or
the URL of object storage), mark (a file's name below it), write (make that file, else look for it), uri ("" or an
MLflow server).
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

PORT = 6379


def gather(asked):
    """All facts; what cannot be found out is an error text in its place."""
    return {
        "time": time.time(),
        "python": list(sys.version_info[:3]),
        "executable": sys.executable,
        "host": platform.node(),
        "packages": packages(asked["packages"]),
        "gpus": gpus(),
        "cuda": cuda(),
        "token": token(),
        "disk": {name: disk(path) for name, path in folders().items()},
        "files": files(),
        "port": port(asked["head"]),
        "storage": storage(asked["storage"], asked["mark"], asked["write"]),
        "mlflow": mlflow(asked["uri"]),
    }


def packages(names):
    try:
        from importlib import metadata
    except ImportError:
        return {}
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def gpus():
    """[[name, driver, MiB]], an empty list without NVIDIA's tool, or why the tool failed."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.check_output(query, stderr=subprocess.STDOUT, timeout=30).decode().strip().splitlines()
    except subprocess.CalledProcessError as error:
        return (error.output.decode().strip().splitlines() or ["nvidia-smi failed"])[0]
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer within 30 s"
    return [[part.strip() for part in line.split(",")] for line in lines]


def cuda():
    """GPUs that torch can use; -1 without torch."""
    try:
        import torch
    except ImportError:
        return -1
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def token():
    path = os.path.expanduser("~/.ray/auth_token")
    if not os.path.exists(path):
        return {"there": False}
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read().strip()).hexdigest()[:12]
    return {"there": True, "digest": digest, "open": bool(os.stat(path).st_mode & 0o077)}


def folders():
    cache = os.environ.get("LANEWISE_CACHE") or os.path.expanduser("~/.cache")
    return {"home": os.path.expanduser("~"), "/tmp": "/tmp", "cache": cache}


def disk(path):
    """Free GiB of the file system that a folder is on, or will be."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free / 2**30


def files():
    """How many files a process may open."""
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def port(head):
    """open, refused (reachable, nobody listens), or why not."""
    if not head:
        return ""
    try:
        socket.create_connection((head, PORT), timeout=5).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return str(error)
    return "open"


def storage(folder, mark, write):
    """Empty if all is well, else what is wrong."""
    if not folder:
        return ""
    if "://" in folder:
        return bucket(folder, mark, write)
    path = os.path.join(folder, mark)
    try:
        if write:
            os.makedirs(folder, exist_ok=True)
            with open(path, "w") as file:
                file.write(mark)
            return ""
        os.listdir(folder)  # an NFS client looks again
        with open(path) as file:
            if file.read() != mark:
                return "holds another file of that name"
        with open(path + "-" + platform.node(), "w"):
            pass
        os.remove(path + "-" + platform.node())
        return ""
    except OSError as error:
        if not os.path.isdir(folder):
            return "is not there"
        return "does not show what the head wrote" if isinstance(error, FileNotFoundError) else str(error.strerror)


def bucket(url, mark, write):
    """The same for object storage, with the packages of this machine."""
    try:
        from tuning.storage import Bucket, StorageError
    except ImportError:
        return "cannot be looked at before the packages are installed"
    place = Bucket(url, patience=0.0)
    try:
        place.check()
        if write:
            place.write(mark, mark.encode())
        else:
            place.read(mark)
    except FileNotFoundError:
        return "does not show what the head wrote"
    except StorageError as error:
        return str(error).replace(url + " ", "")
    return ""


def mlflow(uri):
    if not uri.startswith("http"):
        return ""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10) as answer:
            return "" if answer.status == 200 else f"answers with status {answer.status}"
    except OSError as error:
        return f"does not answer: {getattr(error, 'reason', None) or error}"


if __name__ == "__main__":
    print("FACTS " + json.dumps(gather(json.loads(sys.argv[1]))))
