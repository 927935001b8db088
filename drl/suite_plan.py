"""The runs of a suite: what each is to be, and how far it is.

    <out>/<variant>/<env>/<tier>/seed-<n>/      a run, as `drl train` makes it

What a run is to be comes from the suite's file alone (suite_file.py), how far it is from its folder alone: nothing else
is remembered.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from drl import checkpoint as checkpoints
from drl import evaluate as evaluation
from drl import trees
from drl.config import Config
from drl.config_files import read_config
from drl.names import task as task_name
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

    def adopted(self) -> Config:
        """The config, with what it leaves open as the stored one has it. Raises UserError as `read_config`."""
        if not checkpoints.exists(self.folder):
            return self.config
        stored, config = read_config(self.folder / CONFIG_FILE), self.config
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
        changes = trees.differences(read_config(self.folder / CONFIG_FILE), self.adopted())
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


def step_of(checkpoint: Path) -> int:
    """The updates that the name of a checkpoint's folder tells."""
    return int(checkpoints.STEP.fullmatch(checkpoint.name)[1])
