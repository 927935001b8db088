"""<out>/suite.json: what a suite took. A row for each variant, task, kind of work and machine, added to at each step.

    {"format": 1, "rows": [{"variant", "task", "work": "training" | "scoring", "mode": of acting or "", "device": name,
                            "cores", "versions", "seconds", "count": updates or episodes}]}

What was under way when a process was killed is not in it, neither its seconds nor its updates.
"""

from pathlib import Path
from typing import Any

from drl import disk, foreign, intact

FILE = "suite.json"
KEY = ("variant", "task", "work", "mode", "device", "cores", "versions")
ROW = {"variant": str, "task": str, "work": str, "mode": str, "device": str, "cores": int, "versions": dict[str, str],
       "seconds": float, "count": int}


def add(out: Path, **row: Any) -> None:
    """Add `seconds` and `count` to the row that is this one otherwise.

    Raises:
        UserError: the file there is damaged, or the disk refuses.
    """
    with disk.refusal_told(out, FILE, "make room, then type the same again"), disk.locked(out):
        rows = read(out)
        before = next((other for other in rows if all(other[name] == row[name] for name in KEY)), None)
        if before is None:
            rows.append({name: row[name] for name in ROW})
        else:
            before["seconds"] += row["seconds"]
            before["count"] += row["count"]
        intact.write_sealed(out / FILE, {"format": 1, "rows": rows})


def read(out: Path) -> list[dict[str, Any]]:
    """The rows; none if there is no such file.

    Raises:
        UserError: it is not what `add` writes.
    """
    path = out / FILE
    if not path.exists():
        return []
    told = foreign.checked(intact.read_sealed(path, "suite"), f"suite file {path}", {"rows": list[dict]})
    return [foreign.checked(row, f"suite file {path} (one of its rows)", ROW) for row in told["rows"]]
