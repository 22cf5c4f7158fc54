"""Uploads one large file: prints the hub's description of it. Run as hub_client.py, with the name of a repository."""

import json
import sys
from pathlib import Path

from huggingface_hub import HfApi


def main() -> None:
    api, name = HfApi(), sys.argv[2]
    api.create_repo(name, exist_ok=True)
    api.upload_file(repo_id=name, path_in_repo="large.dat", path_or_fileobj=Path(sys.argv[1]) / "large.dat")
    files = api.list_repo_tree(name)
    sys.stdout.write(json.dumps({file.path: [file.size, file.lfs["sha256"]] for file in files}))


if __name__ == "__main__":
    main()
