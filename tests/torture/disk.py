"""A disk that refuses leaves what stood there as it was: one line tells the bytes needed and free, nothing crashes."""

import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import toys
from torture import toy
from torture.processes import FINDABLE, drl
from torture.trial import Trial

PROMISE = "on a disk that refuses, what stood there stays as it was and one line says why; without a log it trains on"
TRIALS, SECONDS = (48, 16), (120, 30)
UPDATES, SAVED = 80, 40  # SAVED: what the run has reached when the disk begins to refuse
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
AMOUNT = re.compile(r"\d[\d.,]* ?(?:bytes|[kKMG]i?B)\b")


@dataclass(frozen=True)
class Write:
    """Something that `drl` writes.

    Attributes:
        arguments: of the `drl` that does, from the folder of the trial.
        state: what stood there before and must stay, below that folder.
        limit: bytes, from and to: of the largest file, or free on the disk, so that it is refused.
        prepare: makes the earlier state such that it is.
    """

    arguments: Callable[[Path], list[str]]
    state: str
    limit: tuple[int, int]
    prepare: Callable[[Path], None] = lambda place: None


def _train(run: Path, updates: int = UPDATES) -> list[str]:
    """Without a critic, whose 2 MB would be most of what is written."""
    return toy.train(run, train_updates=updates, train_evaluate_every=0, train_value_weight=0.0)


def _pad(name: str, size: int, place: Path) -> None:
    """Have a file of the run hold a line or a result of so many bytes, which stays when the run goes on."""
    file = place / "run" / name
    if name == "evaluation.json":
        content = json.loads(file.read_text())
        content["results"][0]["padding"] = "x" * size
        file.write_text(json.dumps(content) + "\n")
    else:
        first, rest = file.read_text().split("\n", 1)
        file.write_text(json.dumps(json.loads(first) | {"padding": "x" * size}) + "\n" + rest)


def _unpack(place: Path) -> None:
    shutil.rmtree(place / "datasets" / toys.ID / "packed")


WRITES = {
    "checkpoint": Write(lambda place: _train(place / "run"), "run/checkpoints", (20_000, 75_000)),
    "log": Write(lambda place: _train(place / "run"), "", (401_000, 405_000),
                 functools.partial(_pad, "metrics.jsonl", 400_000 - 8_000)),
    "dataset": Write(lambda _: ["data", "collect", "hopper/random", "--steps", "4000", "--overwrite"],
                     "datasets/drl/hopper", (4_000, 60_000)),
    "cache": Write(lambda place: _train(place.with_name("elsewhere"), 1), f"datasets/{toys.ID}/data", (3_000, 4_500),
                   _unpack),
    "evaluation": Write(lambda place: ["evaluate", str(place / "run"), "--seed", "9", "--device", "cpu"],
                        "run/evaluation.json", (16_000, 30_000), functools.partial(_pad, "evaluation.json", 40_000)),
    "export": Write(lambda place: ["export", str(place / "run"), str(place / "policy"), "--overwrite"],
                    "policy", (4_000, 60_000)),
}
SMALL = [name for name in WRITES if name != "log"]  # a full disk refuses the checkpoint as well


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """Everything that is written, under a limit on the size of files, on a disk of 2 MB without room, and on one that
    is read-only; the last two in a mount namespace of their own, where there may be one."""
    mounted = [(disk, name) for disk in ("a full disk", "a read-only disk") for name in SMALL]
    rounds = max(1, trials // (len(WRITES) + len(mounted)))
    with toy.root(folder / "ready"):
        _prepare(folder)
    for _ in range(rounds):
        for name in WRITES:
            yield _try("a limit on files", name, folder, folder / "place", rng)
    seed = int(rng.integers(2**31))
    command = [*NAMESPACE, sys.executable, "-m", "torture.disk", str(folder), str(seed), str(rounds)]
    try:
        subprocess.run([*NAMESPACE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        for disk, name in mounted:
            yield Trial("disk", f"{disk}: {name}", None, "nothing can be mounted here")
        return
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | FINDABLE) as child:
        for line in child.stdout:
            yield Trial.of_row("disk", json.loads(line))
    if child.returncode:
        yield Trial("disk", "the namespace", False, f"it ended with status {child.returncode}")


def _mounted(folder: Path, seed: int, rounds: int) -> None:
    """The trials that need mounts, a line of JSON each."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        for disk in ("a full disk", "a read-only disk"):
            for name in SMALL:
                print(json.dumps(_try(disk, name, folder, folder / "mounted", rng).row()), flush=True)


def _prepare(folder: Path) -> None:
    """<folder>/ready: two datasets, a run that is half done, its evaluation, and its policy; <folder>/undisturbed: the
    same run, done."""
    ready = folder / "ready"
    toy.dataset()
    half = _train(ready / "run")
    commands = [
        WRITES["dataset"].arguments(ready), half,
        ["evaluate", str(ready / "run"), "--device", "cpu"],
        ["export", str(ready / "run"), str(ready / "policy")],
        _train(folder / "undisturbed"),
    ]
    for arguments in commands:
        hook = functools.partial(_stop_after, SAVED) if arguments is half else None
        with drl(arguments, folder / "said", hook=hook) as process:
            if process.wait() != 0 and not hook:
                raise RuntimeError(process.outcome)


def _stop_after(step: int) -> None:
    """Have training end, as if it were killed, at the beginning of the update after so many."""
    from drl.trainer import Trainer

    real = Trainer.descend

    def descend(self, group: int):
        if self.step == step:
            os._exit(0)
        return real(self, group)

    Trainer.descend = descend


def _try(disk: str, name: str, folder: Path, place: Path, rng: np.random.Generator) -> Trial:
    write, began = WRITES[name], time.monotonic()
    limit = int(rng.integers(*write.limit))
    place.mkdir()
    hook = None
    if disk == "a full disk":
        _mount("-t", "tmpfs", "-o", "size=2m", "none", str(place))
    try:
        unneeded = ("run", "policy", "toy") if name == "dataset" else ("hopper",)  # 2 MB hold not all
        shutil.copytree(folder / "ready", place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*unneeded))
        write.prepare(place)
        before = _state(place / write.state) if write.state else {}
        if disk == "a limit on files":
            hook = functools.partial(limit_files, limit)
        elif disk == "a full disk":
            _fill(place, limit)
        else:
            _mount("--bind", str(place), str(place))
            _mount("-o", "remount,bind,ro", str(place))
        with toy.root(place), drl(write.arguments(place), folder / "said", hook=hook) as process:
            process.wait()
        after = _state(place / write.state) if write.state else {}
        lost = [path for path, content in before.items() if after.get(path) != content]
        ok, detail = _judge(name, process, place, folder / "undisturbed", told=disk != "a read-only disk")
        if lost:
            ok, detail = False, f"{lost[0]} and {len(lost) - 1} others are not as they were; {process.outcome}"
    finally:
        if disk != "a limit on files":
            subprocess.run(["umount", "--lazy", str(place)], check=False)
        shutil.rmtree(place)
        shutil.rmtree(place.with_name("elsewhere"), ignore_errors=True)
    return Trial("disk", f"{disk}: {name}", ok, detail, time.monotonic() - began, {"bytes": limit})


def _judge(name: str, process, place: Path, undisturbed: Path, told: bool) -> tuple[bool, str]:
    """Whether a write was refused as it must be; `told`: the line must tell the bytes needed and free."""
    if name == "log":
        if process.status != 0 or not process.told:
            return False, process.outcome
        differ = [path.name for path in toy.steps(undisturbed)[UPDATES].glob("*.safetensors")
                  if (place / "run" / "checkpoints" / path.parent.name / path.name).read_bytes() != path.read_bytes()]
        return not differ, f"{', '.join(differ)} differs" if differ else process.told[-1][:150]
    if name in ("cache", "evaluation") and process.status == 0 and process.told:
        return True, process.told[-1][:150]  # what is not kept is told; the work itself is done
    if not process.refused:
        return False, process.outcome
    line = process.told[-1]
    if told and name != "cache" and len(AMOUNT.findall(line)) < 2:
        return False, f"the bytes needed and free are not told: {line[:250]}"
    return True, line[:150]


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _fill(place: Path, left: int) -> None:
    """Leave about so many bytes free."""
    free = shutil.disk_usage(place).free
    (place / "filler").write_bytes(bytes(max(0, free - left)))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _state(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.rglob("*")
    return {str(file): file.read_bytes() for file in files if file.is_file() and not file.is_symlink()}


if __name__ == "__main__":
    _mounted(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
