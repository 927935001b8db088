"""Figures: the only file that imports matplotlib, and only when a figure is asked for."""

import io
import os
from pathlib import Path

from drl import disk
from drl.errors import UserError


def pyplot(option: str):
    """matplotlib.pyplot without a window.

    Raises:
        UserError: matplotlib is missing; names the option that needs it and the extra to install.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"{option} needs matplotlib; type: pip install 'drl[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, file: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it.

    Raises:
        UserError: there is no room for it, or its place is not that of a file; what stood there is as it was.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"the figure cannot take the place of {file}, which is no file; name a file")
    image = io.BytesIO()
    figure.savefig(image, dpi=100, format="png")
    pyplot("").close(figure)
    file, content = file.resolve(), image.getvalue()
    told = disk.refusal_told(file.parent, f"the figure {file.name}", "make room, or name another file", len(content))
    with told, disk.scratch(file.parent) as partial:
        (partial / file.name).write_bytes(content)
        os.replace(partial / file.name, file)
