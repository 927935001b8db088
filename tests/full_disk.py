"""A child process of test_full_disk.py: the verbs that write datasets, on a disk that refuses.

    python tests/full_disk.py FOLDER MEGABYTES    prints, as JSON, what became of every verb under every fault

MEGABYTES: of a disk to mount on FOLDER, which takes a namespace in which one may; 0: none, and the one fault that needs
none.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import test_d4rl
from drl import cli, disk
from drl.data import minari_writer
from toys import ENVIRONMENT, recorded

ROOT, MEGABYTES = Path(sys.argv[1]), int(sys.argv[2])
OURS, OTHERS = "drl/toy/spring-v0", "other/toy/spring-v0"
FILLER, D4RL = ROOT / "filler", ROOT / "hopper_medium-v2.hdf5"
VERBS = {
    "collect": ["collect", "hopper/random", "--steps", "400", "--overwrite"],
    "import": ["import-d4rl", str(D4RL), "--overwrite"],
    "pack": ["show", OURS],
    "pack in a child": ["show", OTHERS],
    "plot": ["show", OURS, "--plot", str(ROOT / "figure.png")],
}


def drl(verb):
    """Exit status, and what was said but for progress bars."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["data", *VERBS[verb]])
    return status, [line for line in said.getvalue().replace("\r", "\n").splitlines() if line and "%|" not in line]


def files():
    """All that there is, by its path: the bytes of a file, None for a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in ROOT.rglob("*") if path != FILLER}


def fill():
    with contextlib.suppress(OSError), open(FILLER, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def limited(verb):
    """No file may grow beyond six hundred bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full(verb):
    """There is no room left; where room is asked for first, another process takes it just then."""
    found = disk.require_space

    def found_and_filled(*arguments):
        found(*arguments)
        fill()

    if verb in ("collect", "import"):
        disk.require_space = found_and_filled
    else:
        fill()
    try:
        yield
    finally:
        disk.require_space = found
        FILLER.unlink()


@contextlib.contextmanager
def read_only(verb):
    remount("ro")
    try:
        yield
    finally:
        remount("rw")


def remount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", ROOT], check=True)


def outcome(verb, fault):
    """Exit status, what was said, and the paths that are not as they were."""
    if verb == "plot":
        drl("pack")
    else:
        for packed in list(ROOT.rglob("packed")):
            shutil.rmtree(packed)
    before = files()
    with fault(verb):
        status, said = drl(verb)
    after = files()
    return status, said, sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def main():
    if MEGABYTES:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "none", ROOT], check=True)
    os.environ["MINARI_DATASETS_PATH"] = str(ROOT / "datasets")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core: no processes are started to play
    tempfile.tempdir = str(ROOT)
    test_d4rl.save(D4RL, test_d4rl.arrays(test_d4rl.episodes()))
    for dataset in (OURS, OTHERS):
        minari_writer.write(dataset, recorded([500, 600]), environment=ENVIRONMENT, algorithm="", reference=None,
                            description="", extra={})
    for verb in ("collect", "import", "plot"):  # what stands there before
        status, said = drl(verb)
        assert status == 0, said
    faults = [limited, full, read_only] if MEGABYTES else [limited]
    json.dump({f"{verb}, {fault.__name__}": outcome(verb, fault) for fault in faults for verb in VERBS}, sys.stdout)


if __name__ == "__main__":
    main()
