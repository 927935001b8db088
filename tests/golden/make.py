"""Makes the golden files of this version's formats: PYTHONPATH=tests python tests/golden/make.py

Later versions must go on reading them. They are made anew only for a new format, into a folder of its own.
"""

import sys
from pathlib import Path

from test_train import make_config, make_store

from drl import checkpoint_files
from drl.export import export
from drl.train import train

FOLDER = Path(__file__).parent / f"format-{checkpoint_files.FORMAT}"
SETTINGS = dict(updates=6, checkpoint_every=3, keep_checkpoints=2, evaluate_every=6, log_every=3)


def main() -> None:
    if FOLDER.exists():
        sys.exit(f"{FOLDER} is there already, and is what later versions are tested with")
    train(make_config(**SETTINGS), make_store(), FOLDER / "run")
    export(FOLDER / "run", FOLDER / "policy")
    (FOLDER / "run" / "run.lock").unlink()
    for file in (FOLDER / "run").glob("events.*"):
        file.unlink()


if __name__ == "__main__":
    main()
