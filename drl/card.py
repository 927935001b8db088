"""The card of a dataset: what is in it, how good it is, who made it; as text and as a figure."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drl import figures, scores
from drl.behaviour.plan import size
from drl.data import minari_files, minari_metadata
from drl.names import names

BINS = 10  # lines of the histogram in text
BAR = 40  # characters of its longest line
WIDTH = 100  # of the description
REMOTE = [f"mujoco/{task}/{tier}-v0" for task in ("hopper", "walker2d", "halfcheetah") for tier in
          ("simple", "medium", "expert")]  # what Minari hosts for the environments of D4RL's nine tasks


@dataclass(frozen=True)
class Card:
    """A dataset in short.

    Attributes:
        dataset: Minari id.
        environment: Gymnasium id, or "".
        metadata: what the dataset says of itself.
        returns: undiscounted return of each episode, (E,).
        lengths: steps of each episode, (E,).
    """

    dataset: str
    environment: str
    metadata: dict[str, Any]
    returns: np.ndarray
    lengths: np.ndarray

    @property
    def scores(self) -> np.ndarray | None:
        """Normalised score of each episode, (E,); None where there is no reference."""
        reference = scores.reference(self.environment)
        return None if reference is None else scores.normalized_score(self.returns, reference)

    def text(self) -> str:
        rows = [
            ("dataset", self.dataset),
            ("environment", self.environment or "not named"),
            ("made by", made_by(self.metadata)),
            *(("", line) for line in textwrap.wrap(self.metadata.get("description") or "", WIDTH)),
            ("size", f"{len(self.lengths)} episodes, {self.lengths.sum()} steps{_megabytes(self.metadata)}"),
            ("return", _spread(self.returns)),
        ]
        if self.scores is not None:
            rows.append(("score", f"{_spread(self.scores)} (0 random, 100 expert: {scores.REFERENCE_SOURCE})"))
        rows.append(("length", f"{_spread(self.lengths)} steps"))
        counts, edges = _histogram(self.lengths)
        for count, low, high in zip(counts, edges, edges[1:]):
            bar = "#" * int(np.ceil(BAR * count / counts.max()))
            rows.append(("", f"{low:>5.0f} to {high:<5.0f} {bar:<{BAR}} {count}"))
        return "\n".join(f"{name:<12}{value}".rstrip() for name, value in rows)

    def draw(self, file: Path) -> None:
        """Histograms of returns, with their normalised scores, and of lengths, as PNG."""
        canvas, (left, right) = figures.pyplot("--plot").subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        left.hist(self.returns, bins=50, color="tab:blue")
        left.set(xlabel="return of an episode", ylabel="episodes")
        if (reference := scores.reference(self.environment)) is not None:
            above = left.secondary_xaxis("top", functions=(
                lambda returns: scores.normalized_score(returns, reference),
                lambda score: reference.random + score / 100 * (reference.expert - reference.random),
            ))
            above.set_xlabel("normalised score: 0 random, 100 expert")
        right.hist(self.lengths, bins=np.linspace(0, self.lengths.max(), 51), color="tab:orange")
        right.set(xlabel="length of an episode, steps", ylabel="episodes")
        canvas.suptitle(f"{self.dataset}: {len(self.lengths)} episodes, {self.lengths.sum()} steps")
        figures.save(canvas, file)


def card(dataset_id: str) -> Card:
    """The card of a local dataset.

    Raises:
        UserError: it is not there, or malformed.
    """
    store = minari_files.read(dataset_id)
    metadata = minari_metadata.read(minari_files.path(dataset_id))
    return Card(dataset_id, store.spaces.environment, metadata, store.episode_returns, store.episode_lengths)


def listing() -> str:
    """The datasets on this machine, and where others come from."""
    local = minari_files.local_ids()
    lines = ["on this machine"] + [f"  {line(dataset)}" for dataset in local]
    if not local:
        lines.append("  none")
    lines.append("to collect, without a network")
    for name in names():
        if f"drl/{name}-v0" not in local:
            lines.append(f"  {f'drl/{name}-v0':<36}{size(name):>9} steps   drl data collect {name}")
    lines.append("to download from Minari")
    lines += [f"  {dataset:<36}{'':<15}   drl data download {dataset}" for dataset in REMOTE if dataset not in local]
    lines.append("to import, from D4RL's original files")
    lines.append(f"  {'d4rl/<env>/<tier>-v2':<36}{'':<15}   drl data import-d4rl <env>_<tier>-v2.hdf5")
    return "\n".join(lines)


def line(dataset_id: str) -> str:
    """A local dataset on one line, from its metadata alone."""
    metadata = minari_metadata.read(minari_files.path(dataset_id))
    line = f"{dataset_id:<36}{metadata['total_steps']:>9} steps{metadata['total_episodes']:>8} episodes"
    if "dataset_size" in metadata:
        line += f"{metadata['dataset_size']:>8.0f} MB"
    reference = scores.reference(minari_metadata.named_environment(metadata))
    if reference is not None and "returns" in metadata:
        line += f"   mean score {scores.normalized_score(metadata['returns']['mean'], reference):.1f}"
    return line


def made_by(metadata: dict[str, Any]) -> str:
    """Author, algorithm, seed and versions, as far as the dataset names them."""
    authors = metadata.get("author") or []
    parts = [", ".join([authors] if isinstance(authors, str) else authors) or "author not named"]
    if algorithm := metadata.get("algorithm_name"):
        parts.append(str(algorithm))
    if (seed := metadata.get("collection_seed")) is not None:
        parts.append(f"collection seed {seed}")
    if source := metadata.get("source"):
        parts.append(f"from {source['file']}")
    if versions := metadata.get("versions"):
        parts += [f"{name} {version}" for name, version in versions.items() if name in ("gymnasium", "mujoco")]
    return ", ".join(parts)


def _spread(values: np.ndarray) -> str:
    return f"mean {values.mean():.1f}, std {values.std():.1f}, min {values.min():.1f}, max {values.max():.1f}"


def _megabytes(metadata: dict[str, Any]) -> str:
    return f", {metadata['dataset_size']} MB" if "dataset_size" in metadata else ""


def _histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges; one bin where all are equal."""
    return np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
