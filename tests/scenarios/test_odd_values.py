"""Values at the edge of what a database keeps: each is refused, and by every database alike."""

import pytest

from registry.errors import Invalid, Usage
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World


def test_a_moment_outside_of_the_calendar_is_refused(embedded: Cli) -> None:
    for option, moment in (("--since", "0001-01-01T00:00:00+14:00"), ("--until", "9999-12-31T23:59:59-00:01")):
        refused = embedded("audit", option, moment)
        assert refused.code == 6
        assert option.removeprefix("--") in refused.err
        assert "years 1 to 9999" in refused.err


def test_a_text_with_a_nul_is_refused_by_every_database_alike(stocked: Cli, world: World) -> None:
    release = "/v1/adapters/acme/sql/releases/1.0.0"
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    bodies: list[tuple[str, dict[str, object]]] = [
        (f"{release}/yank", {"reason": "a\0b"}),
        ("/v1/tokens", {"name": "a\0b"}),
        ("/v1/compositions", {"recipe": {"notes": ["a\0b"]}}),
        ("/v1/compositions", {"recipe": {"a\0b": 1}}),
    ]
    with api_of(stocked) as api:
        for path, body in bodies:
            with pytest.raises(Invalid) as raised:
                api.post(path, body)
            assert raised.value.code == "bad_value", path
        with pytest.raises(Usage, match="subject has a NUL"):
            api.get("/v1/audit", subject="a\0b")
        with pytest.raises(Usage) as refused_cursor:
            api.get("/v1/adapters", cursor="AA")  # a NUL in base64
        assert refused_cursor.value.code == "bad_cursor"
