"""The runs of a suite: what each is to be, and how far it is.

    <out>/<variant>/<env>/<tier>/seed-<n>/      a run, as `drl train` makes it

What a run is to be comes from the suite's file alone (suite_file.py), how far it is from its folder alone: nothing else
is remembered. What another machine made, and sent as a pack (report_pack.py), need not be made again.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drl import checkpoint as checkpoints
from drl import evaluate as evaluation
from drl.config import Config
from drl.config_files import differences, read_config
from drl.errors import UserError
from drl.names import task as task_name
from drl.report_pack import Pack
from drl.report_pack import Run as Packed
from drl.train import CONFIG_FILE


@dataclass(frozen=True)
class Ask:
    """One evaluation of a run.

    Attributes:
        step: updates of the checkpoint.
        mode: of acting, recurrent or window.
        episodes, seed: as in EvaluateConfig.
        target_scale: factor on the config's target returns.
    """

    step: int
    mode: str
    episodes: int
    seed: int
    target_scale: float = 1.0

    def of(self, config: Config) -> Config:
        """The config that asks for it; `config` names its target returns."""
        targets = [self.target_scale * target for target in config.evaluate.target_returns]
        asked = dataclasses.replace(config.evaluate, mode=self.mode, episodes=self.episodes, seed=self.seed,
                                    target_returns=targets)
        return dataclasses.replace(config, evaluate=asked)

    def __str__(self) -> str:
        return self.mode + ("" if self.target_scale == 1 else f", target x {self.target_scale:g}")


@dataclass(frozen=True)
class Run:
    """What a run is to be: its config, which leaves open what machine and data decide, and its evaluations."""

    variant: str
    folder: Path
    config: Config
    asks: tuple[Ask, ...]

    @property
    def task(self) -> str:
        return task_name(self.config.dataset)

    @property
    def name(self) -> str:
        """Its folder below that of the suite."""
        return f"{self.variant}/{self.task}/seed-{self.config.seed}"

    def adopted(self) -> Config:
        """The config, with what it leaves open as the stored one has it. Raises UserError as `read_config`."""
        if not checkpoints.exists(self.folder):
            return self.config
        return self.adopting(read_config(self.folder / CONFIG_FILE))

    def adopting(self, stored: Config) -> Config:
        """The config, with what it leaves open as `stored` has it."""
        config = self.config
        train = {name: getattr(stored.train, name) for name in ("precision", "compile")
                 if getattr(config.train, name) == "auto"}
        targets = config.evaluate.target_returns or stored.evaluate.target_returns
        return dataclasses.replace(
            config,
            environment=config.environment or stored.environment,
            train=dataclasses.replace(config.train, **train),
            evaluate=dataclasses.replace(config.evaluate, target_returns=targets),
        )

    def step(self) -> int:
        """Updates of its newest checkpoint, sound or not; 0: there is none."""
        return step_of(checkpoints.find(self.folder)) if checkpoints.exists(self.folder) else 0

    def is_trained(self) -> bool:
        return self.step() >= self.config.train.updates

    def missing(self) -> list[Ask]:
        """The evaluations of which there is no result. Raises UserError where what is stored cannot be read."""
        config = self.adopted()
        return [ask for ask in self.asks if not evaluation.is_stored(self.folder, ask.of(config), ask.step)]

    def changes(self) -> list[str]:
        """What the stored config says otherwise; of a run that is trained, not how it is scored, nor on what device."""
        if not checkpoints.exists(self.folder):
            return []
        changes = differences(read_config(self.folder / CONFIG_FILE), self.adopted())
        trained = self.is_trained()
        return [change for change in changes if not (trained and change.startswith(("evaluate.", "device ")))]

    def state(self) -> str:
        """As `--dry-run` shows it: new, stopped at update N, trained, scored."""
        if not (step := self.step()):
            return "new"
        if step < self.config.train.updates:
            return f"stopped at update {step}"
        return "done, not scored" if self.missing() else "scored"


@dataclass(frozen=True)
class Job:
    """All seeds of a variant and a task."""

    variant: str
    task: str
    runs: tuple[Run, ...]


def left_by(jobs: Sequence[Job], pack: Pack, what: str) -> list[Job]:
    """The jobs less the runs that a pack holds with every score that is asked of their last checkpoint, from whatever
    machine; scores on the way to it are not looked for.

    Raises:
        UserError: a run in `what`, the name of the pack, was trained with other settings than the suite says.
    """
    packed = {run.name: run for run in pack.runs}
    jobs = [dataclasses.replace(job, runs=tuple(
        run for run in job.runs if run.name not in packed or not _is_scored(run, packed[run.name], what)
    )) for job in jobs]
    return [job for job in jobs if job.runs]


def _is_scored(run: Run, packed: Packed, what: str) -> bool:
    config = run.adopting(packed.config)
    if changes := differences(packed.config, config, beside=False):
        raise UserError(f"{run.name} in {what} was trained with other settings than the suite says "
                        f"({', '.join(changes)}); leave that file out, or name the variant otherwise")
    return packed.made() >= {(ask.step, ask.mode, target, ask.episodes, ask.seed) for ask in run.asks
                             if ask.step == config.train.updates for target in ask.of(config).evaluate.target_returns}


def step_of(checkpoint: Path) -> int:
    """The updates that the name of a checkpoint's folder tells."""
    return int(checkpoints.STEP.fullmatch(checkpoint.name)[1])
