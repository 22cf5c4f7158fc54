"""Pushes a folder of large files, part of it again, and all of it with a token that lacks the right: prints the
results. Run as hub_client.py, with the folder, the name of a repository and a reader's token."""

import json
import sys
from pathlib import Path

from hub_client import error, files
from huggingface_hub import CommitOperationAdd, HfApi

api = HfApi()


def main() -> None:
    directory, pushed, name, reader = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    api.create_repo(name)
    first = api.upload_folder(repo_id=name, folder_path=pushed, commit_message="First").oid
    listed = {entry.path: entry.lfs["sha256"] for entry in api.list_repo_tree(name)}
    pulled = files(api.snapshot_download(name, cache_dir=directory / "pulled"))
    turned = CommitOperationAdd("random.dat", str(Path(pushed) / "text.dat"))
    second = api.create_commit(name, [turned], commit_message="Another file").oid
    again = api.upload_folder(repo_id=name, folder_path=pushed, commit_message="Again").oid
    seen = {
        "files": listed,
        "pulled": pulled,
        "commits": [first, second, again],
        "again": files(api.snapshot_download(name, cache_dir=directory / "again")),
        "reader": error(lambda: HfApi(token=reader).upload_folder(repo_id=name, folder_path=pushed))[1],
    }
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
