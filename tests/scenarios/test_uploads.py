"""Announcing, sending and completing bytes over REST: present files, refusals, and protection from other users."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.api.http.problems import problem_response
from registry.client.api import Api
from registry.domain.access.audit import Actor
from registry.errors import Conflict, Invalid, NotAllowed, NotFound, TooLarge, TooMany, Usage
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer import collect, uploads
from registry.transfer.collect import Swept
from registry.transfer.resources import Resources
from registry.transfer.uploads import PlannedUpload
from registry.wire.transfer import PutOut
from tests import services
from tests.scenarios.conftest import USER
from tests.scenarios.traces import api_of, opened, s3_of, traces
from tests.scenarios.world import SMALL_PARTS, Cli, World


def row(content: bytes, path: str = "notes.txt") -> dict[str, Any]:
    return {"path": path, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def plan(api: Api, content: bytes, namespace: str = "acme") -> dict[str, Any]:
    return api.post("/v1/uploads", {"namespace": namespace, "files": [row(content)]})["files"][0]


def complete(api: Api, planned: Mapping[str, Any]) -> dict[str, Any]:
    return api.post(f"/v1/uploads/{planned['upload']}/complete")


def put(api: Api, content: bytes, namespace: str = "acme") -> None:
    planned = plan(api, content, namespace)
    api.send(PutOut.read(planned["put"]), iter([content]))
    complete(api, planned)


def put_of_part(api: Api, planned: Mapping[str, Any], number: int, part: bytes) -> dict[str, Any]:
    return api.post(f"/v1/uploads/{planned['upload']}/parts/{number}", {"sha256": hashlib.sha256(part).hexdigest()})


def send_part(api: Api, planned: Mapping[str, Any], number: int, content: bytes) -> None:
    """Sends that part of `content`, in parts of 5 MiB."""
    part = content[(number - 1) * (5 << 20) : number * (5 << 20)]
    api.send(PutOut.read(put_of_part(api, planned, number, part)), iter([part]))


def test_bytes_are_announced_sent_and_completed_and_present_afterwards(cli: Cli) -> None:
    content = os.urandom(200_000)
    with api_of(cli) as api:
        planned = plan(api, content)
        assert (planned["present"], planned["put"]["method"]) == (False, "PUT")
        api.send(PutOut.read(planned["put"]), iter([content]))
        done = complete(api, planned)
        assert done == {"sha256": row(content)["sha256"], "size_bytes": len(content)}
        assert complete(api, planned) == done, "completing twice is fine"
        assert plan(api, content) | {"path": ""} == {
            "path": "", "sha256": done["sha256"], "present": True, "upload": None, "put": None, "parts": [],
        }  # fmt: skip
        with api.stream(f"/v1/blobs/{done['sha256']}") as stream:
            assert b"".join(stream.chunks) == content
        with api.stream(f"/v1/blobs/{done['sha256']}", 1000, 50) as stream:
            assert b"".join(stream.chunks) == content[1000:1050]
    assert (traces(cli).blobs, traces(cli).work) == ({done["sha256"]}, frozenset())


def test_what_one_namespace_has_sent_is_not_present_in_another_until_it_sends_the_same(cli: Cli) -> None:
    content = b"weights that acme trained"
    with api_of(cli) as api:
        put(api, content)
        planned = plan(api, content, "globex")
        assert not planned["present"]
        with pytest.raises((Conflict, NotFound)) as raised:
            complete(api, planned)
        assert raised.value.code == "upload_incomplete", "knowing the digest is not enough"
        api.send(PutOut.read(planned["put"]), iter([content]))
        complete(api, planned)
        assert plan(api, content, "globex")["present"]
    assert (len(traces(cli).blobs), traces(cli).work) == (1, frozenset())


def test_an_upload_that_was_sent_but_not_completed_is_only_completed(cli: Cli) -> None:
    content = b"sent by a client that died"
    with api_of(cli) as api:
        planned = plan(api, content)
        api.send(PutOut.read(planned["put"]), iter([content]))
        again = plan(api, content)
        if not again["present"]:  # if the store receives the bytes, the registry has not checked them yet
            assert (again["upload"], again["put"], again["parts"]) == (planned["upload"], None, [])
            complete(api, again)
        assert plan(api, content)["present"]


@pytest.mark.on("PostgreSQL")
def test_a_file_with_two_names_is_sent_once(cli: Cli) -> None:
    content = b"the same"
    files = [row(content, "a.txt"), row(content, "b.txt")]
    with api_of(cli) as api:
        planned = api.post("/v1/uploads", {"namespace": "acme", "files": files})["files"]
        assert [upload["path"] for upload in planned] == ["a.txt", "b.txt"]
        assert planned[0]["upload"] == planned[1]["upload"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"path": "../outside"}, "bad_path"),
        ({"path": "data/.Git/config"}, "hidden_file"),
        ({"path": "model.pt"}, "pickle"),
        ({"size_bytes": 2**60}, "file_too_large"),
        ({"size_bytes": 9}, "size_differs"),
    ],
)
def test_what_could_never_be_released_is_not_even_announced(embedded: Cli, change: dict[str, Any], code: str) -> None:
    with api_of(embedded) as api:
        plan(api, b"0123456789")
        with pytest.raises(Invalid) as raised:
            api.post("/v1/uploads", {"namespace": "acme", "files": [row(b"0123456789") | change]})
        assert raised.value.code == code


def test_who_announces_without_sending_is_stopped(embedded: Cli) -> None:
    few = Cli(embedded.environment | {"ADAPTORY_MAX_OPEN_UPLOADS": "3"})
    with api_of(few) as api:
        for number in range(3):
            plan(api, b"x" * number)
        plan(api, b"")  # announced before, so it is not a new one
        with pytest.raises(TooMany) as raised:
            plan(api, b"one more")
        assert raised.value.code == "too_many_uploads"
        put(api, b"x")
        plan(api, b"one more")
        with pytest.raises(TooLarge) as refused:  # no waiting helps
            api.post("/v1/uploads", {"namespace": "acme", "files": [row(b"%d" % number) for number in range(4)]})
        assert (refused.value.code, refused.value.retry_after_s) == ("too_many_files", None)


def test_what_has_expired_stops_nobody_and_until_then_the_error_says_how_long_to_wait(embedded: Cli) -> None:
    resources = opened(Cli(embedded.environment | {"ADAPTORY_MAX_OPEN_UPLOADS": "2"}))
    lasts_s = resources.settings.upload_expires_s
    eve = publisher(resources, "acme")
    one, two, three, four = (ManifestFile("a", 1, Digest(f"{number}" * 64)) for number in range(4))
    uploads.plan(resources, eve, "acme", [one])
    later = replace(eve, at=eve.at + timedelta(seconds=600))
    uploads.plan(resources, later, "acme", [two])
    with pytest.raises(TooMany, match="2 announced files") as raised:
        uploads.plan(resources, later, "acme", [three])
    assert raised.value.retry_after_s == lasts_s - 600
    assert problem_response(raised.value).headers["Retry-After"] == str(lasts_s - 600)
    after = replace(eve, at=eve.at + timedelta(seconds=lasts_s + 1))
    uploads.plan(resources, after, "acme", [three])
    for expired in (one, four):
        with pytest.raises(TooMany):
            uploads.plan(resources, after, "acme", [expired])
    resources.close()


def test_what_somebody_else_let_expire_counts_for_who_announces_it_again(embedded: Cli) -> None:
    resources = opened(Cli(embedded.environment | {"ADAPTORY_MAX_OPEN_UPLOADS": "1"}))
    file, other = (ManifestFile("a", 1, Digest(f"{number}" * 64)) for number in range(2))
    ann, eve = publisher(resources, "acme", "ann"), publisher(resources, "acme")
    uploads.plan(resources, ann, "acme", [file])
    uploads.plan(resources, eve, "acme", [file])
    with pytest.raises(TooMany):  # while it lasts, it belongs to the user who announced it first
        uploads.plan(resources, ann, "acme", [other])
    later = timedelta(seconds=resources.settings.upload_expires_s + 1)
    eve, ann = replace(eve, at=eve.at + later), replace(ann, at=ann.at + later)
    uploads.plan(resources, eve, "acme", [file])
    with pytest.raises(TooMany, match="eve has 1 announced files"):
        uploads.plan(resources, eve, "acme", [other])
    uploads.plan(resources, ann, "acme", [other])
    resources.close()


def publisher(resources: Resources, namespace: str, name: str = "eve") -> Actor:
    return Actor(name, resources.clock(), {namespace: "publisher"})


def deliver(resources: Resources, actor: Actor, announced: PlannedUpload, content: bytes) -> None:
    """Sent to whom the plan names, be it the store or the registry, and completed."""
    upload_id = announced.upload_id or ""
    if announced.put is None:
        uploads.receive_body(resources, actor, upload_id, announced.file.sha256, [content], len(content))
    else:
        httpx2.put(announced.put.url, content=content, headers=dict(announced.put.headers)).raise_for_status()
    uploads.complete(resources, actor, upload_id)


def test_an_upload_of_another_namespace_is_not_there(embedded: Cli) -> None:
    resources = opened(embedded)
    file = ManifestFile("notes.txt", 4, Digest(hashlib.sha256(b"mine").hexdigest()))
    mine, other = publisher(resources, "acme"), publisher(resources, "globex")
    announced = uploads.plan(resources, mine, "acme", [file])[0]
    assert announced.upload_id is not None
    for attempt in (
        lambda: uploads.complete(resources, other, announced.upload_id or ""),
        lambda: uploads.receive_body(resources, other, announced.upload_id or "", file.sha256, [b"mine"], 4),
        lambda: uploads.readable(resources, other, file.sha256),
        lambda: uploads.complete(resources, mine, "0" * 32),
    ):
        with pytest.raises(NotFound):
            attempt()
    reader = replace(mine, grants={"acme": "reader"})
    with pytest.raises(NotAllowed):
        uploads.complete(resources, reader, announced.upload_id)
    deliver(resources, mine, announced, b"mine")
    assert uploads.readable(resources, mine, file.sha256).size_bytes == 4
    with pytest.raises(NotFound):
        uploads.readable(resources, other, file.sha256)
    resources.close()


def test_bytes_reported_as_present_are_kept_for_the_push(embedded: Cli) -> None:
    """An unused blob is about to be collected when a push learns that it need not send it."""
    resources = opened(embedded)
    actor = publisher(resources, "acme")
    file = ManifestFile("notes.txt", 4, Digest(hashlib.sha256(b"mine").hexdigest()))
    deliver(resources, actor, uploads.plan(resources, actor, "acme", [file])[0], b"mine")
    later = resources.clock() + timedelta(days=30)
    much_later = replace(resources, clock=lambda: later)
    collect.sweep(resources, later)
    assert collect.collect(much_later, grace=timedelta(days=1), dry_run=True).blobs == 1
    assert uploads.plan(much_later, replace(actor, at=later), "acme", [file])[0].upload_id is None
    assert collect.collect(much_later, grace=timedelta(days=1)).blobs == 0
    assert resources.store.stat(file.sha256) is not None
    resources.close()


def test_an_upload_that_nobody_finished_is_forgotten_in_time(embedded: Cli) -> None:
    resources = opened(embedded)
    actor = publisher(resources, "acme")
    file = ManifestFile("notes.txt", 4, Digest(hashlib.sha256(b"mine").hexdigest()))
    upload_id = uploads.plan(resources, actor, "acme", [file])[0].upload_id or ""
    now = resources.clock()
    assert collect.sweep(resources, now) == Swept(0, 0)
    later = now + timedelta(seconds=resources.settings.upload_expires_s + 60)
    with pytest.raises(NotFound):
        uploads.complete(resources, replace(actor, at=later), upload_id)
    again = uploads.plan(resources, replace(actor, at=now + timedelta(hours=1)), "acme", [file])[0]
    assert again.upload_id == upload_id
    assert collect.sweep(resources, later) == Swept(0, 0), "it was asked for again since"
    deliver(resources, actor, again, b"mine")
    assert collect.sweep(resources, later + timedelta(hours=2)) == Swept(0, 0), "it came"
    with pytest.raises(NotFound):
        uploads.complete(resources, actor, upload_id)
    resources.close()


def swept_in_time(resources: Resources, left: Path) -> bool:
    """Whether the leftovers of a dead process stay as long as an upload may last, and are gone afterwards."""
    now = resources.clock()
    too_early, stayed = collect.sweep(resources, now), left.exists()
    later = collect.sweep(resources, now + timedelta(seconds=resources.settings.upload_expires_s + 60))
    return (too_early, stayed, later, left.exists()) == (Swept(0, 0), True, Swept(0, 1), False)


def test_what_a_dead_process_was_working_on_is_removed_in_time(embedded: Cli) -> None:
    resources = opened(embedded)
    left = resources.work_directory / "upload-of-a-dead-process"
    left.mkdir()
    assert swept_in_time(resources, left)
    resources.close()


def test_half_a_blob_of_a_dead_process_is_removed_in_time(on_disk: Cli) -> None:
    """For a directory; the leftovers in S3 are tested below."""
    resources = opened(on_disk)
    left = resources.settings.store_directory / "incoming" / "half"
    left.write_bytes(b"ha")
    assert swept_in_time(resources, left)
    resources.close()


@pytest.fixture
def on_s3(tmp_path: Path) -> Cli:
    """The embedded registry with its blobs in S3, where 11 MiB are large."""
    given = services.pairing("PostgreSQL and S3") | SMALL_PARTS
    return Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": USER, **given})


def test_the_registry_takes_no_bytes_where_the_store_takes_them(on_s3: Cli, world: World) -> None:
    content = b"weights"
    with api_of(on_s3) as api:
        planned = plan(api, content)
        assert httpx2.URL(planned["put"]["url"]).host == "127.0.0.1", "the address of the store"
        by_the_registry = {"url": f"/v1/blobs/{planned['sha256']}?upload={planned['upload']}", "headers": {}}
        with pytest.raises(Usage) as raised:
            api.send(PutOut.read(by_the_registry | {"headers": {"Content-Length": "7"}}), iter([content]))
        assert raised.value.code == "sent_directly"


def test_wrong_bytes_are_never_a_blob_of_the_opened(on_s3: Cli) -> None:
    content = os.urandom(12 << 20)
    with api_of(on_s3) as api:
        planned = plan(api, content)
        wrong = b"?" + content[1:]
        for part in planned["parts"]:
            send_part(api, planned, part["number"], wrong)
        with pytest.raises(Invalid) as raised:
            complete(api, planned)
        assert (raised.value.code, raised.value.subject) == ("digest_differs", planned["sha256"])
        small = plan(api, b"promised")
        with pytest.raises(Conflict):
            api.send(PutOut.read(small["put"]), iter([b"smuggled"]))
        with pytest.raises(NotFound), api.stream(f"/v1/blobs/{planned['sha256']}"):
            pass
        assert not plan(api, content)["present"]
        again = plan(api, content)
        assert not any(part["present"] for part in again["parts"]), "all of it is wanted again"


def test_large_files_are_planned_in_parts_and_go_on_where_they_stopped(on_s3: Cli) -> None:
    content = os.urandom(12 << 20)
    with api_of(on_s3) as api:
        planned = plan(api, content)
        assert [part["size_bytes"] for part in planned["parts"]] == [5 << 20, 5 << 20, 2 << 20]
        send_part(api, planned, 2, content)
        again = plan(api, content)
        assert again["upload"] == planned["upload"]
        assert [part["number"] for part in again["parts"] if not part["present"]] == [1, 3]
        send_part(api, again, 1, content)
        send_part(api, again, 3, content)
        complete(api, again)
        with api.stream(f"/v1/blobs/{planned['sha256']}") as stream:
            assert b"".join(stream.chunks) == content


def test_a_wrong_part_is_refused_by_the_store_and_the_others_stay(on_s3: Cli) -> None:
    content = os.urandom(12 << 20)
    with api_of(on_s3) as api:
        planned = plan(api, content)
        send_part(api, planned, 1, content)
        second = content[5 << 20 : 10 << 20]
        promised = put_of_part(api, planned, 2, second)
        with pytest.raises(Conflict) as raised:
            api.send(PutOut.read(promised), iter([second[:-1] + bytes([second[-1] ^ 1])]))
        assert raised.value.code == "store_refused"
        assert [part["present"] for part in plan(api, content)["parts"]] == [True, False, False]
        api.send(PutOut.read(promised), iter([second]))
        send_part(api, planned, 3, content)
        complete(api, planned)


@pytest.mark.long
def test_those_who_announce_the_same_large_file_at_once_send_one_upload(on_s3: Cli) -> None:
    client, bucket, prefix = s3_of(on_s3)
    with api_of(on_s3) as api, ThreadPoolExecutor(8) as pool:
        for count in range(1, 9):
            content = os.urandom(11 << 20)
            planned = list(pool.map(lambda _, content=content: plan(api, content)["upload"], range(8)))
            assert len(set(planned)) == 1
            begun = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]
            assert len(begun) == count, "what the others began has ended"


def test_parts_that_were_not_planned_are_unknown(on_s3: Cli) -> None:
    with api_of(on_s3) as api:
        for content, number in ((b"sent whole", 1), (os.urandom(12 << 20), 4)):
            planned = plan(api, content)
            with pytest.raises(NotFound) as raised:
                put_of_part(api, planned, number, b"x")
            assert (raised.value.code, raised.value.subject) == ("part_unknown", planned["upload"])


def test_an_expired_upload_in_s3_leaves_nothing(on_s3: Cli) -> None:
    content = os.urandom(12 << 20)
    with api_of(on_s3) as api:
        planned = plan(api, content)
        send_part(api, planned, 1, content)
        put(api, b"finished")
    resources = opened(on_s3)
    later = resources.clock() + timedelta(days=3)
    assert collect.sweep(resources, resources.clock()) == Swept(0, 0)
    assert collect.sweep(resources, later) == Swept(1, 1)
    assert collect.sweep(resources, later) == Swept(0, 0)
    assert [blob.size_bytes for blob in resources.store.iterate()] == [len(b"finished")]
    resources.close()
    with api_of(on_s3) as api:
        assert not any(part["present"] for part in plan(api, content)["parts"])
