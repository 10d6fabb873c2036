"""Released tokenizers of the Hugging Face hub: fetched once, then read without a network."""

import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data.activity import print_line
from data.block_cache import default_folder
from data.errors import DataError
from data.files import write_atomically
from data.storage import AnyPath, StoragePath

_FILE, _COMPANION, _COMMIT = "tokenizer.json", "tokenizer_config.json", "commit"
_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


def is_on_hub(path: AnyPath) -> bool:
    """Whether a path is one of the hub."""
    return isinstance(path, StoragePath) and path.url.startswith("hf://")


def fetched(path: StoragePath) -> Path:
    """The folder in the user's cache with the tokenizer at `path`, as it was first fetched.

    Without a commit in the URL, it is the newest of that time, which the file `commit` names.
    Raises DataError where it is not in the cache and cannot be fetched.
    """
    if path.name == _FILE:
        path = path.parent
    name = quote(path.url.removeprefix("hf://"), safe="@")
    folder = default_folder().with_name("tokenizers") / name
    if not (folder / _FILE).is_file():
        try:
            _fetch(path, folder)
        except OSError as error:
            raise DataError(
                f"cannot fetch the tokenizer {path}: {error.strerror or error}."
            ) from error
    return folder


def _fetch(path: StoragePath, folder: Path) -> None:
    """Writes the files of one commit into `folder`, the tokenizer itself last."""
    pinned, commit = path.attempt(lambda driver: _pinned(driver, path))
    if not (pinned / _FILE).is_file():
        raise DataError(f"no tokenizer at {path}: expected {_FILE} there.")
    if (pinned / _COMPANION).is_file():
        write_atomically(folder / _COMPANION, (pinned / _COMPANION).read_bytes())
    write_atomically(folder / _COMMIT, f"{commit}\n")
    write_atomically(folder / _FILE, (pinned / _FILE).read_bytes())
    print_line(
        f"v4: the tokenizer {path} is now in {folder}, as of commit {commit}; {pinned} names the "
        "same one on other machines",
        sys.stderr,
    )


def _pinned(driver: Any, path: StoragePath) -> tuple[StoragePath, str]:
    """The same place at one commit, and the commit."""
    from huggingface_hub import HfApi

    place = driver.resolve_path(path.url)
    api = HfApi(endpoint=driver.endpoint, token=driver.token)
    facts = api.repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision)
    repository = f"hf://{_PREFIXES[place.repo_type]}{place.repo_id}@{facts.sha}"
    return StoragePath(f"{repository}/{place.path_in_repo}".rstrip("/")), str(facts.sha)
