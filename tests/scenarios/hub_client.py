"""A team's work with `huggingface_hub`, in an environment that has nothing else: prints its results as JSON. Run as a
program: `HF_ENDPOINT=URL HF_TOKEN=... python hub_client.py DIRECTORY`."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

FAMILIES = ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "HfHubHTTPError", "HTTPError")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
api = HfApi()


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def files(directory: str) -> dict[str, str]:
    below = (path for path in Path(directory).rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(directory).as_posix(): digest(str(path)) for path in sorted(below)}


def error(act: Callable[[], object]) -> list[str]:
    """The exception's class, if it is one that programs catch, and its text."""
    try:
        act()
    except Exception as raised:
        names = [kind.__name__ for kind in type(raised).__mro__]
        return [next((name for name in FAMILIES if name in names), names[0]), str(raised)]
    return ["", ""]


def describe() -> dict[str, object]:
    info = api.model_info("acme/sql", revision="prod", files_metadata=True)
    tree = list(api.list_repo_tree("acme/sql", recursive=True, expand=True, revision="prod"))
    refs = api.list_repo_refs("acme/sql")
    user = api.whoami()
    return {
        "whoami": [user["name"], [org["name"] for org in user["orgs"]]],
        "info": {
            sibling.rfilename: [sibling.size, sibling.lfs["sha256"] if sibling.lfs else None]
            for sibling in info.siblings
        },
        "id": [info.id, info.private, info.library_name, info.card_data.base_model],
        "tree": {entry.path: entry.size for entry in tree if hasattr(entry, "size")},
        "brought": {entry.path: entry.last_commit["title"] for entry in tree},
        "paths": [entry.path for entry in api.get_paths_info("acme/sql", [WEIGHTS, "absent"], revision="prod")],
        "branches": {branch.name: branch.target_commit for branch in refs.branches},
        "tags": {tag.name: tag.target_commit for tag in refs.tags},
        "commits": [
            [list_repo_commit.title, list_repo_commit.commit_id]
            for list_repo_commit in api.list_repo_commits("acme/sql")
        ],
        "models": sorted(list_model.id for list_model in api.list_models(author="acme")),
        "searched": [
            list_model.id for list_model in api.list_models(search="SQL", filter="base_model:adapter:Acme/Tiny-Llama")
        ],
        "limited": len(list(api.list_models(limit=1))),
        "exists": [api.repo_exists("acme/sql"), api.repo_exists("acme/ghost"), api.repo_exists("gpt2")],
        "revision_exists": [api.revision_exists("acme/sql", revision) for revision in ("prod", "v1.1.0", "ghost")],
        "file_exists": [api.file_exists("acme/sql", path, revision="prod") for path in (CONFIG, "absent.txt")],
    }


def download(directory: Path) -> dict[str, object]:
    """Everything twice: the second time from the cache."""
    commit = api.model_info("acme/sql", revision="prod").sha
    revisions = {
        "prod": "prod",
        "1.0.0": "1.0.0",
        "v1.1.0": "v1.1.0",
        "main": "main",
        "commit": commit,
        "short": commit[:9],
    }
    seen: dict[str, object] = {}
    for _ in range(2):
        seen["files"] = {
            name: digest(hf_hub_download("acme/sql", WEIGHTS, revision=revision))
            for name, revision in revisions.items()
        }
        seen["snapshot"] = files(snapshot_download("acme/sql", revision="prod"))
        seen["alias"] = files(snapshot_download("acme/sql.prod"))
        seen["alias_file"] = digest(hf_hub_download("acme/sql.v1.1.0", CONFIG))
    seen["directory"] = files(snapshot_download("acme/sql", revision="1.1.0", local_dir=directory / "plain"))
    system = HfFileSystem()
    seen["listed"] = sorted(Path(path).name for path in system.ls("acme/sql@prod", detail=False))
    seen["part"] = system.cat_file(f"acme/sql@prod/{WEIGHTS}", start=8, end=24).hex()
    return seen


def errors() -> dict[str, list[str]]:
    return {
        "repository": error(lambda: hf_hub_download("acme/ghost", CONFIG)),
        "revision": error(lambda: hf_hub_download("acme/sql", CONFIG, revision="ghost")),
        "commit": error(lambda: snapshot_download("acme/sql", revision="0" * 40)),
        "file": error(lambda: hf_hub_download("acme/sql", "absent.txt", revision="prod")),
        "directory": error(lambda: list(api.list_repo_tree("acme/sql", "absent"))),
        "anonymous": error(lambda: api.model_info("acme/sql", token=False)),
        "wrong": error(lambda: api.model_info("acme/sql", token="adp_wrong")),  # noqa: S106
        "create": error(lambda: api.create_repo("acme/new")),
    }


def run_command(directory: Path) -> str:
    """Runs the command line of the library."""
    name = "hf" if Path(sys.executable).with_name("hf").exists() else "huggingface-cli"
    command = [Path(sys.executable).with_name(name), "download", "acme/sql", CONFIG, "--revision", "prod"]
    subprocess.run([*command, "--local-dir", directory / "command"], check=True, capture_output=True, env=os.environ)
    return digest(str(directory / "command" / CONFIG))


def main() -> None:
    directory = Path(sys.argv[1])
    seen = {
        "version": huggingface_hub.__version__,
        "described": describe(),
        "downloaded": download(directory),
        "errors": errors(),
        "command": run_command(directory),
    }
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
