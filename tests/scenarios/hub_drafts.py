"""A publisher and a reader use `huggingface_hub` where commits are drafts: prints their results as JSON. Run as
hub_client.py, with `push` and the directory of an adapter, or with `read` and a file with the ids of commits. The last
argument is the namespace."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hub_client import error, files
from huggingface_hub import HfApi

api = HfApi()
NAME = f"{sys.argv[4]}/sql"


def push(directory: Path, adapter: Path) -> dict[str, object]:
    """The commits of a publisher without a key."""
    api.create_repo(NAME, exist_ok=True)
    first = api.upload_folder(repo_id=NAME, folder_path=adapter, commit_message="Trained").oid
    second = api.upload_file(repo_id=NAME, path_in_repo="notes.txt", path_or_fileobj=b"notes", revision="next").oid
    return {
        "commits": [first, second],
        "next": files(api.snapshot_download(NAME, revision="next", cache_dir=directory / "next")),
        "by_id": files(api.snapshot_download(NAME, revision=first, cache_dir=directory / "id")),
        "branches": branches(),
        "log": [list_repo_commit.title for list_repo_commit in api.list_repo_commits(NAME, revision="next")],
        "main": error(lambda: api.model_info(NAME)),
        "tag": error(lambda: api.create_tag(NAME, tag="9.0.0")),
    }


def read(directory: Path, ids: Path) -> dict[str, object]:
    """The answers that anyone else gets."""
    calls: dict[str, Callable[[str], object]] = {
        "snapshot": lambda at: api.snapshot_download(NAME, revision=at, cache_dir=directory / "cache-of-drafts"),
        "info": lambda at: api.model_info(NAME, revision=at),
        "tree": lambda at: list(api.list_repo_tree(NAME, revision=at)),
        "commits": lambda at: api.list_repo_commits(NAME, revision=at),
        "paths": lambda at: api.get_paths_info(NAME, ["notes.txt"], revision=at),
        "file": lambda at: api.hf_hub_download(NAME, "notes.txt", revision=at, cache_dir=directory / "cache-of-files"),
    }
    commits: list[str] = json.loads(ids.read_text())
    revisions = ["next", *commits, *(commit[:12] for commit in commits)]
    seen = {f"{name} {at}": error(partial(call, at)) for name, call in calls.items() for at in revisions}
    return {
        "drafts": len(seen),
        "not_hidden": {call: inputs_ for call, inputs_ in seen.items() if inputs_[0] != "RevisionNotFoundError"},
        "main": error(lambda: api.model_info(NAME)),
        "served": error(lambda: api.snapshot_download(NAME, cache_dir=directory / "cache-of-main")),
        "files": files(str(directory / "cache-of-main")),
        "branches": branches(),
        "titles": [list_repo_commit.title for list_repo_commit in api.list_repo_commits(NAME)] if branches() else [],
    }


def branches() -> dict[str, str]:
    return {branch.name: branch.target_commit for branch in api.list_repo_refs(NAME).branches}


if __name__ == "__main__":
    act = {"push": push, "read": read}[sys.argv[2]]
    sys.stdout.write(json.dumps(act(Path(sys.argv[1]), Path(sys.argv[3]))))
