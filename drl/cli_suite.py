"""`drl suite`: its options made ready, and what it tells. Imports stand inside, so that `drl --help` answers
at once."""

import re
from pathlib import Path

from drl.errors import UserError


def run(options) -> None:
    """Train and score what `options` of the command line name.

    Raises:
        UserError: a mistake; or runs failed, which were told when they did.
    """
    from drl import report_pack, suite
    from drl.suite_file import Wanted, read
    from drl.suite_plan import left_by
    from drl.suite_screen import Screen, duration

    file, devices = Path(options.suite), _devices(options.devices)
    out = Path(options.out or f"runs/{file.stem}")
    wanted = Wanted(tuple(options.only), tuple(options.tasks), tuple(options.seeds), _part(options.part))
    jobs = read(file, out, devices[0].partition(":")[0], wanted)
    for name in options.packed:
        jobs = left_by(jobs, report_pack.read(Path(name)), name)
    if not jobs:
        print(f"nothing is left to do: all of it is in {' '.join(options.packed)}")
        return
    if options.dry_run:
        from drl.suite_estimate import told

        print(told(jobs, out, devices))
        return
    suite.require_unchanged(jobs)
    _have_datasets(jobs, options.collect)
    runs = sum(len(job.runs) for job in jobs)
    print(f"{file.stem}: {runs} runs in {len(jobs)} jobs into {out}, training on {' '.join(devices)}", flush=True)
    screen = Screen(jobs)
    ended = suite.run(jobs, out, devices, screen)
    left = f", left to other processes {ended.left}" if ended.left else ""
    print(f"done {ended.done}, skipped {ended.skipped}, failed {ended.failed}{left}; {duration(screen.seconds)}\n"
          f"report      drl report {out}")
    if ended.failed:
        raise UserError(f"{ended.failed} of {runs} runs failed, as told above; mend that and type the same again")


def _devices(asked: list[str]) -> list[str]:
    import torch

    from drl.resolve import resolve_device

    if asked == ["auto"]:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    devices = [resolve_device("cuda:0" if device == "cuda" else device) for device in asked]
    if "cpu" in devices and len(devices) > 1:
        raise UserError(f"--devices names {' '.join(devices)}; name cpu alone, or GPUs, since a run must go on where "
                        "it began")
    return devices


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part must be I/N with I from 1 to N, such as 2/4, got {text!r}")
    return part, parts


def _have_datasets(jobs, collect: bool) -> None:
    """Raises UserError unless the datasets that are needed are here, or can be collected now."""
    from drl.collect import collect as make
    from drl.data import minari_files, minari_metadata
    from drl.names import names
    from drl.names import task as task_name

    needed = {job.runs[0].config.dataset for job in jobs if not all(one.is_trained() for one in job.runs)}
    missing = [dataset for dataset in sorted(needed) if minari_metadata.flaw(minari_files.path(dataset))]
    collectable = {f"drl/{name}-v0": name for name in names()}
    if collect:
        for dataset in [dataset for dataset in missing if dataset in collectable]:
            broken = minari_files.path(dataset).exists()
            make(collectable[dataset], overwrite=broken)
            missing.remove(dataset)
    if missing:
        cures = [f"drl data collect {task_name(dataset)}" if dataset in collectable else
                 f"drl data import-d4rl FILE for {dataset}" if dataset.startswith("d4rl/") else
                 f"drl data download {dataset}" for dataset in missing]
        what = "dataset is" if len(missing) == 1 else "datasets are"
        more = "" if collect or not set(missing) & set(collectable) else "; or add --collect"
        raise UserError(f"{len(missing)} {what} not here; type: {' && '.join(cures)}{more}")
