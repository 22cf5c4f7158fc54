"""A trainer's use of `huggingface_hub` after training: prints its results as JSON. Run as hub_client.py, with the
directory of an adapter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hub_client import error, files
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

api = HfApi()


def pushed_by_command(name: str, adapter: Path) -> dict[str, str]:
    """The files uploaded by the library's command line."""
    command = Path(sys.executable).with_name("hf")
    command = command if command.exists() else command.with_name("huggingface-cli")
    subprocess.run([command, "upload", name, adapter, "."], check=True, capture_output=True, env=os.environ)
    return uploaded(name)


def pushed_as_large(name: str, adapter: Path, directory: Path) -> dict[str, str]:
    """The files uploaded by the upload for large folders, in the versions that have it. It writes into the folder."""
    if not hasattr(api, "upload_large_folder"):
        return {}
    api.upload_large_folder(name, shutil.copytree(adapter, directory / "large"), repo_type="model", print_report=False)
    return uploaded(name)


def uploaded(name: str) -> dict[str, str]:
    return {
        entry.path: entry.lfs["sha256"] for entry in api.list_repo_tree(name, recursive=True) if hasattr(entry, "lfs")
    }


def main() -> None:
    directory, adapter = Path(sys.argv[1]), Path(sys.argv[2])
    wanted = sys.argv[3].title().replace("Acme", "acme")
    name = api.create_repo(wanted, private=True).repo_id
    again = api.create_repo(wanted, exist_ok=True).repo_id
    empty = api.model_info(name)
    first = api.upload_folder(repo_id=name, folder_path=adapter, commit_message="Trained").oid
    repeated = api.upload_folder(repo_id=name, folder_path=adapter, commit_message="Trained").oid
    notes = CommitOperationAdd("notes.txt", b"some notes")
    second = api.create_commit(name, [notes], commit_message="Notes", parent_commit=first).oid
    unreleased = files(api.snapshot_download(name, cache_dir=directory / "unreleased"))
    other = CommitOperationAdd("x.txt", b"x")
    stale = error(lambda: api.create_commit(name, [other], commit_message="x", parent_commit=first))
    api.create_commit(name, [CommitOperationDelete("notes.txt")], commit_message="No notes")
    third = api.model_info(name).sha
    api.create_tag(name, tag="1.0.0", tag_message="The first")
    api.create_tag(name, tag="1.1.0-rc.1", revision=second)
    refs = api.list_repo_refs(name)
    seen = {
        "names": [name, again],
        "empty": [empty.sha, [sibling.rfilename for sibling in empty.siblings or []]],
        "commits": [first, repeated, second, third],
        "log": [list_repo_commit.title for list_repo_commit in api.list_repo_commits(name)],
        "unreleased": unreleased,
        "tags": {tag.name: tag.target_commit for tag in refs.tags},
        "branches": {branch.name: branch.target_commit for branch in refs.branches},
        "released": files(api.snapshot_download(name, revision="1.0.0", cache_dir=directory / "released")),
        "command": pushed_by_command(f"{name}-by-command", adapter),
        "large": pushed_as_large(f"{name}-large", adapter, directory),
        "errors": {
            "stale": stale,
            "pickle": error(lambda: api.upload_file(repo_id=name, path_in_repo="a.pkl", path_or_fileobj=b"x")),
            "hidden": error(lambda: api.upload_file(repo_id=name, path_in_repo=".envrc", path_or_fileobj=b"x")),
            "tag": error(lambda: api.create_tag(name, tag="1.0.0")),
            "version": error(lambda: api.create_tag(name, tag="final")),
            "channel": error(lambda: api.create_commit(name, [other], commit_message="x", revision="prod")),
            "absent": error(lambda: api.delete_file("absent.txt", name)),
        },
    }
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
