"""Minari's servers: asked once whether they can be reached, then left to Minari."""

import contextlib
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import minari

from drl.data.minari_metadata import line
from drl.errors import UserError

REMOTES = {"hf": "https://huggingface.co", "gcp": "https://storage.googleapis.com"}  # by the scheme of MINARI_REMOTE
PATIENCE = 10.0  # seconds until a server that does not answer counts as out of reach
CURE = ("make a dataset here (drl data collect --help), or name the folder of one that you have (export "
        "MINARI_DATASETS_PATH=FOLDER) or another server (export MINARI_REMOTE=...)")


def fetch(dataset_id: str, root: Path, failure: str, hint: str) -> None:
    """Have Minari download a dataset into the datasets root `root`. What it says in doing so goes to stderr.

    Args:
        dataset_id: Minari id.
        root: a folder of its own.
        failure, hint: how the message of a failure begins and ends.

    Raises:
        UserError: there is no network, no such dataset, or the extra is not installed.
    """
    if reason := _unreachable():
        raise UserError(f"{failure}: {reason}; {CURE}{hint}")
    try:
        with datasets_path(root), contextlib.redirect_stdout(sys.stderr):
            minari.download_dataset(dataset_id)
    except ImportError as error:
        raise UserError(f"downloading {dataset_id} needs an extra; type: pip install 'drl[download]'") from error
    except Exception as error:  # network, hub or id: minari raises whatever its remote raised
        raise UserError(f"{failure} ({line(error)}); {CURE}{hint}") from error


def _unreachable() -> str:
    """Why the server is out of reach; empty: it answers. Minari would find out too, after half a minute of retries."""
    url = REMOTES.get(os.environ.get("MINARI_REMOTE", "hf").partition("://")[0])
    if url == REMOTES["hf"]:
        url = os.environ.get("HF_ENDPOINT", url)  # huggingface_hub's own
    try:
        if url:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return ""  # an answer
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # an answer, too: the hub brings certificates of its own
            return f"{url} cannot be reached ({reason})"
    return ""


@contextlib.contextmanager
def datasets_path(folder: Path | str) -> Iterator[None]:
    """Another datasets root for Minari, for a while."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
