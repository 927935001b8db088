"""Figures: the only file that imports matplotlib, and only when a figure is asked for."""

from pathlib import Path

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
    """Write a figure as PNG and close it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, format="png")
    pyplot("").close(figure)
