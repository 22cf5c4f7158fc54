"""Facts about bases, channels, scores and times are derived by the registry, not claimed by a client."""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from composer.formats.checkpoints.hashing import weights_digest
from registry.api.routes import documents
from registry.errors import Conflict, Invalid, Usage
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World

ROWS = [("lm_head.weight", "BF16", (3, 5), "1" * 64), ("model.norm.weight", "F32", (5,), "2" * 64)]


def base_of(rows: list[Any], **more: Any) -> dict[str, Any]:
    table = [dict(zip(("name", "dtype", "shape", "sha256"), row, strict=True)) for row in rows]
    digest = weights_digest(rows)
    return {"name": "small", "model_type": "llama", "tied": False, "weights_digest": digest, "tensors": table, **more}


def test_a_bases_figures_follow_from_its_tensors(cli: Cli) -> None:
    with api_of(cli) as api:
        made = api.post("/v1/bases", base_of(ROWS))
        assert (made["parameters"], made["size_bytes"], made["tensor_count"]) == (20, 50, 2)
        for figure in ("parameters", "size_bytes"):
            with pytest.raises((Invalid, Usage)):
                api.post("/v1/bases", base_of(ROWS, **{figure: 1}))
        unlike: tuple[dict[str, Any], ...] = ({"tied": True}, {"model_type": "qwen2"})
        for other in unlike:
            with pytest.raises(Conflict, match="These weights are 'small'"):
                api.post("/v1/bases", base_of(ROWS, **other))
        for rows, code in (
            ([("w", "F99", (1,), "1" * 64)], "unknown_dtype"),
            ([("w", "F32", (1 << 40, 1 << 40), "1" * 64)], "base_too_large"),
        ):
            with pytest.raises(Invalid) as raised:
                api.post("/v1/bases", base_of(rows, name="odd"))
            assert raised.value.code == code
        assert [base["name"] for base in api.get("/v1/bases")["items"]] == ["small"]


def test_what_a_base_was_made_from_before_a_correction_is_in_the_audit(cli: Cli) -> None:
    with api_of(cli) as api:
        digests = [
            api.post("/v1/bases", base_of([(*ROWS[0][:3], str(number) * 64)], name=f"base-{number}"))["digest"]
            for number in (3, 4)
        ]
        for origin in ("base-3", "base-4"):
            api.post("/v1/bases", base_of(ROWS, derived_from=origin, relation="finetuned"))
    rows = [row for row in cli.json("audit", "--act", "base:update")["items"] if "derived_from" in row["after"]]
    origins = sorted(
        (row["id"], (row["before"] or {}).get("derived_from"), row["after"]["derived_from"]) for row in rows
    )
    assert [row[1:] for row in origins] == [(None, digests[0]), (digests[0], digests[1])]


@pytest.mark.long
def test_a_channel_tells_what_it_gives_out_and_what_it_passes_over(stocked: Cli, world: World) -> None:
    for name, version in (("sql", "1.0.0"), ("other-sql", "1.1.0")):
        stocked.ok("push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny", "--channel", "prod")

    def channel_state() -> list[Any]:
        with api_of(stocked) as api:
            one = api.get("/v1/adapters/acme/sql/channels/prod")
            assert api.get("/v1/adapters/acme/sql/channels")["items"] == [one]
            return [one["version"], one["passes_over"], api.get("/v1/adapters/acme/sql")["channels"]]

    assert channel_state() == ["1.1.0", None, {"prod": "1.1.0"}]
    stocked.ok("yank", "acme/sql:1.1.0", "--reason", "leaks names")
    assert channel_state() == ["1.0.0", "1.1.0", {"prod": "1.0.0"}]
    assert stocked.json("show", "acme/sql@prod")["version"] == "1.0.0"
    stocked.ok("yank", "acme/sql:1.0.0", "--reason", "so does this one")
    assert channel_state() == [None, "1.1.0", {}]


@pytest.mark.long
def test_the_first_score_of_its_author_says_which_way_a_metric_is_better(stocked: Cli, world: World) -> None:
    for name in ("sql", "support"):
        stocked.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    with api_of(stocked) as api:
        suite = api.get("/v1/suites")["items"][0]

        def record(name: str, value: float, higher_is_better: bool) -> None:
            score = {"suite_digest": suite["digest"], "metric": "f1", "value": value, "n": 1}
            path = f"/v1/adapters/acme/{name}/releases/1.0.0/scores"
            api.post(path, {"scores": [{**score, "higher_is_better": higher_is_better}]})

        record("sql", 0.1, True)
        record("support", 0.9, True)
        with pytest.raises(Invalid):
            record("support", 0.9, False)
    hits = stocked.json("search", "--sort", f"{suite['name']}.f1")["items"]
    assert [release["repository"] for release in hits] == ["acme/support", "acme/sql"]


def test_a_moment_is_the_same_in_every_zone(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    with api_of(stocked) as api:
        newest = max(datetime.fromisoformat(row["at"]) for row in api.get("/v1/audit")["items"])
        for after, expected in ((timedelta(minutes=-30), True), (timedelta(minutes=30), False)):
            for hours in (-2, 0, 5):
                since = (newest + after).astimezone(timezone(timedelta(hours=hours)))
                assert bool(api.get("/v1/audit", since=since.isoformat())["items"]) == expected, since
            naive = (newest + after).replace(tzinfo=None)  # interpreted as UTC
            assert bool(api.get("/v1/audit", since=naive.isoformat())["items"]) == expected, naive


def test_a_namespace_takes_no_key_that_is_too_long(cli: Cli) -> None:
    with api_of(cli) as api, pytest.raises((Invalid, Usage)):
        api.put("/v1/namespaces/acme", {"signing_keys": ["-----BEGIN PUBLIC KEY-----\n" + "A" * 3_000]})


def test_a_page_of_very_long_documents_ends_early_and_the_next_goes_on(
    stocked_embedded: Cli, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = stocked_embedded
    for number in range(5):
        cli.ok("push", world.adapters["sql"], f"acme/sql:1.{number}.0", "--base", "tiny")
    path = "/v1/adapters/acme/sql/releases"
    with api_of(cli) as api:
        releases, hits = (list(api.pages(address, limit=5)) for address in (path, "/v1/releases"))
        monkeypatch.setattr(documents, "PAGE_BYTES", 1)
        for one, all_of_them in ((path, releases), ("/v1/releases", hits)):
            assert len(api.get(one, limit=5)["items"]) == 1
            assert list(api.pages(one, limit=5)) == all_of_them
        monkeypatch.setattr(documents, "BATCH_SIZE", 2)
        assert list(api.pages(path, limit=5)) == releases
        monkeypatch.setattr(documents, "PAGE_BYTES", 1 << 30)
        assert api.get(path, limit=5)["items"] == releases


def test_lists_of_names_may_have_spaces_and_say_a_name_twice(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    with api_of(stocked) as api:
        [release] = api.get("/v1/releases")["items"]
        names = [*release["adapter"]["targets"], release["adapter"]["targets"][0]]
        for asked in ("targets_exact", "targets_within", "targets_include"):
            assert api.get("/v1/releases", **{asked: " , ".join(names)})["items"] == [release], asked
        for asked in ("license", "base", "targets_within", "sort"):
            with pytest.raises(Invalid) as raised:
                api.get("/v1/releases", **{asked: "a\0b"})
            assert raised.value.code == "bad_value"
