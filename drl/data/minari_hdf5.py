"""What an HDF5 file of Minari's must look like before Minari reads it: HDF5 follows links into other files and calls
plugins to decompress, and Minari reads as many episodes as it is told to, however many there are."""

from pathlib import Path

import h5py
from h5py import h5d, h5g, h5l, h5z

from drl.errors import UserError

FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")
FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}  # HDF5's own


def check(file: Path, episodes: int, dataset_id: str) -> None:
    """Look at the structure of a file, not at its numbers.

    Raises:
        UserError: it holds more or fewer episodes, or data that do not lie in the file itself as plain arrays.
        Exception: whatever a damaged file makes h5py raise.
    """
    with h5py.File(file, "r", locking="best-effort") as content:  # some network disks have no locks
        if len(content) != episodes:
            raise UserError(f"dataset {dataset_id}: metadata.json says total_episodes {episodes}, {len(content)} were "
                            "found")
        # h5py's lower level: its upper one takes five times as long
        for number in range(episodes):
            where = f"dataset {dataset_id}, episode {number}"
            _refuse_link(content.id, f"episode_{number}", where)
            group = h5g.open(content.id, f"episode_{number}".encode())
            for field in FIELDS:
                _refuse_link(group, field, f"{where}, field {field}")
                layout = h5d.open(group, field.encode()).get_create_plist()
                if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count():
                    raise UserError(f"{where}, field {field}: its data lie in other files")
                if not FILTERS.issuperset(layout.get_filter(place)[0] for place in range(layout.get_nfilters())):
                    raise UserError(f"{where}, field {field}: is stored with a filter that is not HDF5's own")


def _refuse_link(group: h5g.GroupID, name: str, where: str) -> None:
    if group.links.get_info(name.encode()).type != h5l.TYPE_HARD:
        raise UserError(f"{where}: is a link; the data must lie in the file itself")
