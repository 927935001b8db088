"""Collect all datasets at full size, measure them, and write the tables of docs/data.md.

    python scripts/measure_data.py collect OUT [NAME ...]   time `drl data collect` and the physics alone, one by one
    python scripts/measure_data.py tables OUT               rewrite the tables between the marks in docs/data.md

`collect` writes OUT/<env>-<tier>.json for each; those that the page shows are in docs/data/. It needs an otherwise
idle machine and about 3 GB in the datasets root; a dataset that is there is collected anew. All fifteen take about
12 minutes on two cores, from 6 seconds to two minutes each. A maintainers' verb.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from drl import scores
from drl.behaviour import actor
from drl.data import minari_files, minari_metadata
from drl.names import names as collectable
from drl.versions import versions

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
# D4RL v2: episodes, mean and standard deviation of returns, largest return; None: not known. Sources: docs/data.md
D4RL = {
    "hopper/random": (45_000, 18.4, 17.5, 292.6),
    "hopper/medium": (2_190, 1422.1, 379.0, 3222.4),
    "hopper/medium-replay": (2_040, 467.3, 511.0, 3192.9),
    "hopper/medium-expert": (3_220, 2090.0, None, 3759.1),
    "hopper/expert": (1_030, 3511.4, 328.6, 3759.1),
    "halfcheetah/random": (1_000, -288.8, 80.4, -85.4),
    "halfcheetah/medium": (1_000, 4770.3, 355.8, 5309.4),
    "halfcheetah/medium-replay": (202, 3093.0, 1681.0, None),
    "halfcheetah/medium-expert": (2_000, 7713.0, None, 11252.0),
    "halfcheetah/expert": (1_000, 10656.4, 441.7, 11252.0),
    "walker2d/random": (None, 1.87, 5.8, 75.0),
    "walker2d/medium": (1_190, 2852.1, 1095.4, 4226.9),
    "walker2d/medium-replay": (1_090, 683.0, 896.0, None),
    "walker2d/medium-expert": (2_190, 3797.0, None, 5011.7),
    "walker2d/expert": (1_000, 4920.5, 136.4, 5011.7),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("collect", "tables"))
    parser.add_argument("out", type=Path, help="folder of the measurements, one JSON file for each dataset")
    parser.add_argument("names", nargs="*", help="<env>/<tier> (default: all)")
    arguments = parser.parse_args()
    names = arguments.names or collectable()
    if arguments.verb == "collect":
        arguments.out.mkdir(parents=True, exist_ok=True)
        for place, name in enumerate(names):
            if not (measured := measure(name)):
                sys.exit(f"{name} was not timed: an earlier call had played some of it, and this one went on; now it "
                         "is whole, type: python scripts/measure_data.py collect "
                         f"{arguments.out} {' '.join(names[place:])}")
            (arguments.out / f"{name.replace('/', '-')}.json").write_text(json.dumps(measured, indent=1) + "\n")
            print(name, {key: measured[key] for key in ("seconds", "rate", "physics_rate", "share")}, flush=True)
    else:
        tables({name: json.loads((arguments.out / f"{name.replace('/', '-')}.json").read_text()) for name in names})


def measure(name: str) -> dict | None:
    """The whole command, from the shell's point of view, beside the physics alone, by its own account.

    None where the command went on with what an earlier call had played: it tells no rate then.
    """
    dataset = f"drl/{name}-v0"
    began = time.perf_counter()
    command = [sys.executable, "-m", "drl.cli", "data", "collect", name, "--overwrite"]
    told = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    seconds = time.perf_counter() - began
    if not (rate := re.search(r"alone, on \d+ cores: (\d+)", told)):
        return None
    physics_rate = int(rate[1])
    metadata = minari_metadata.read(minari_files.path(dataset))
    environment = minari_metadata.named_environment(metadata)
    store = minari_files.read(dataset)
    score = scores.normalized_score(store.episode_returns, scores.reference(environment))
    return {
        "dataset": dataset,
        "episodes": metadata["total_episodes"],
        "steps": metadata["total_steps"],
        "megabytes": metadata["dataset_size"],
        "returns": metadata["returns"],
        "lengths": metadata["lengths"],
        "score": {"mean": score.mean(), "std": score.std(), "max": score.max()},
        "sha256": metadata["sha256"],
        "seconds": round(seconds, 1),
        "rate": round(metadata["total_steps"] / seconds),
        "physics_rate": physics_rate,
        "share": round(metadata["total_steps"] / seconds / physics_rate, 3),
        "replay": compare(store, actor.card(name.partition("/")[0])) if name.endswith("medium-replay") else None,
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def compare(store, card: dict) -> dict:
    """How near a regenerated medium-replay comes to what the replay buffer of the training run held."""
    buffer = card["replay_buffer"]
    mean, std = np.array(buffer["state_mean"]), np.array(buffer["state_std"])
    found = {"returns": store.episode_returns, "lengths": store.episode_lengths}
    result = {
        "buffer": {key: buffer[key] for key in ("steps", "episodes", "return_mean", "return_std", "length_mean",
                                                "length_std")},
        "state_mean_off": np.abs((store.observations.mean(0, dtype=np.float64) - mean) / std).tolist(),
        "state_std_ratio": (store.observations.std(0, dtype=np.float64) / std).tolist(),
    }
    for kind, field in (("return", "returns"), ("length", "lengths")):
        histogram = buffer[f"{kind}_histogram"]
        edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
        ours, _ = np.histogram(np.clip(found[field], edges[0], edges[-1]), bins=edges)
        # half the sum of differences of shares: 0 where the histograms agree, 1 where they have nothing in common
        result[f"{kind}_histogram_distance"] = 0.5 * np.abs(ours / ours.sum() - counts / counts.sum()).sum()
    return result


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def tables(measured: dict[str, dict]) -> None:
    text = PAGE.read_text()
    for mark, table in (("content", content(measured)), ("speed", speed(measured)), ("replay", replay(measured))):
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: begin + table + end, text, flags=re.DOTALL)
    PAGE.write_text(text)


def content(measured: dict[str, dict]) -> str:
    lines = ["| dataset | episodes | steps | return mean | std | max | score mean | std | max | D4RL v2: episodes | "
             "return mean | std | max | score mean |", "|---|" + "---:|" * 13]
    for name, m in measured.items():
        episodes, mean, std, most = D4RL[name]
        reference = scores.reference(actor.card(name.partition("/")[0])["environment"])
        theirs = [f"{scores.normalized_score(mean, reference):.1f}"]
        lines.append(
            f"| {name} | {m['episodes']} | {m['steps']} | {m['returns']['mean']:.1f} | {m['returns']['std']:.1f} | "
            f"{m['returns']['max']:.1f} | **{m['score']['mean']:.1f}** | {m['score']['std']:.1f} | "
            f"{m['score']['max']:.1f} | "
            + " | ".join([*("-" if value is None else f"{value:g}" for value in (episodes, mean, std, most)), *theirs])
            + " |"
        )
    return "\n".join(lines) + "\n"


def speed(measured: dict[str, dict]) -> str:
    lines = ["| dataset | wall time s | steps/s | physics alone steps/s | share | MB |", "|---|" + "---:|" * 5]
    lines += [
        f"| {name} | {m['seconds']:.1f} | {m['rate']} | {m['physics_rate']} | {100 * m['share']:.0f}% | "
        f"{m['megabytes']:.0f} |"
        for name, m in measured.items()
    ]
    nine = [m for name, m in measured.items() if name.split("/")[1] in ("medium", "medium-replay", "medium-expert")]
    lines.append(f"| the nine tasks of D4RL | {sum(m['seconds'] for m in nine):.0f} | "
                 f"{sum(m['steps'] for m in nine) / sum(m['seconds'] for m in nine):.0f} | | | "
                 f"{sum(m['megabytes'] for m in nine):.0f} |")
    any_of = next(iter(measured.values()))
    about = ", ".join(f"{name} {version}" for name, version in any_of["versions"].items() if name != "torch")
    where = f"{any_of['processor']}, {any_of['cores']} cores, Python {any_of['python']}, {about}."
    return "\n".join([*lines, "", where, ""])


def replay(measured: dict[str, dict]) -> str:
    lines = ["| medium-replay | who | episodes | return mean | std | length mean | std | return histogram off by | "
             "length histogram off by | state mean off by (median, max) | state std ratio (min, max) |",
             "|---|---|" + "---:|" * 9]
    for name, m in measured.items():
        if r := m["replay"]:
            b = r["buffer"]
            lines.append(f"| {name.partition('/')[0]} | replay buffer of the run | {b['episodes']} | "
                         f"{b['return_mean']:.1f} | {b['return_std']:.1f} | {b['length_mean']:.1f} | "
                         f"{b['length_std']:.1f} | | | | |")
            lines.append(
                f"| | regenerated | {m['episodes']} | {m['returns']['mean']:.1f} | {m['returns']['std']:.1f} | "
                f"{m['lengths']['mean']:.1f} | {m['lengths']['std']:.1f} | "
                f"{100 * r['return_histogram_distance']:.0f}% | {100 * r['length_histogram_distance']:.0f}% | "
                f"{np.median(r['state_mean_off']):.2f}, {max(r['state_mean_off']):.2f} std | "
                f"{min(r['state_std_ratio']):.2f}, {max(r['state_std_ratio']):.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
