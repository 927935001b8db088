"""A disk that is full, limited or not ours to write on: what stood there stands, nothing is left over, and one line
says what was refused, how much was needed and what to do.

It happens in a child process (full_disk.py), which mounts a small disk where it may. HDF5 makes a process that meets a
full disk crash: then every test here fails.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = [sys.executable, Path(__file__).with_name("full_disk.py")]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]  # also for root: what is mounted there goes with it
REASONS = {"limited": "File too large", "full": "No space left on device", "read_only": "Read-only file system"}
DATASETS, TEMPORARY = "make room, .* export MINARI_DATASETS_PATH=FOLDER", "make room, .* export TMPDIR=FOLDER"
CURES = {"collect": DATASETS, "import": DATASETS, "pack": TEMPORARY, "pack in a child": TEMPORARY,
         "plot": "make room, or name another file"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of verbs under faults: exit status, what was said, and the paths that are not as they were."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        trial = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", folder], capture_output=True)
        mounts = trial.returncode == 0
    except FileNotFoundError:
        mounts = False
    command = [*NAMESPACE, *CHILD, folder, "24"] if mounts else [*CHILD, folder, "0"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, (child.returncode, child.stderr)
    return json.loads(child.stdout)


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("verb", CURES)
def test_a_refused_write_is_one_line_and_neither_loses_nor_leaves_anything(verb, fault, outcomes):
    if f"{verb}, {fault}" not in outcomes:
        pytest.skip("needs a disk of its own: run as root, or let users have namespaces of their own (sysctl "
                    "kernel.apparmor_restrict_unprivileged_userns=0 user.max_user_namespaces=1000)")

    status, said, changed = outcomes[f"{verb}, {fault}"]

    assert (status, len(said), changed) == (2, 1, []), said
    refused = (f"drl: .* cannot be written: {REASONS[fault]} in .*; it needs .* MB, .* MB are free; what stood there "
               f"before is as it was; {CURES[verb]}")
    asked = f"drl: .* needs .* MB in .*, 0 MB are free; {CURES[verb]}"  # the import asks again when it knows the fields
    assert re.fullmatch(asked if (verb, fault) == ("import", "full") else refused, said[0])
