"""Torture: the promises about reliability, each tried many times, and every failure counted.

    trial.py        what one try is, and the table of all tries
    imports.py      what a forked process has imported
    processes.py    `drl` in processes of its own: started anew, or forked from one that has imported everything
    toy.py          a small dataset, runs of it, and whether two runs are the same
    watch.py        what a run is doing, seen from its folder alone
    STORM.py        kills, signals, resume, flips, disk, starts, evaluations, hostile: one promise each
    figure.py       the figure
    __main__.py     the command line: scripts/torture

A storm is a module with a PROMISE, the default TRIALS and about how many SECONDS these take (long, short), and
`run(trials, folder, rng, short)`, which gives its trials one by one. Nothing of this is part of the package `drl`.
"""
