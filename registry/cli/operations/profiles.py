"""Registries that this user has logged in to: login, logout, profile list | use.

`$ADAPTORY_HOME/profiles.json`, readable only by its owner, maps names to a URL and a token, and names the one in use.
A command uses the first of `--profile` (or ADAPTORY_PROFILE), ADAPTORY_URL, the profile in use, and the embedded
registry. The name `local` always means the embedded registry.
"""

import sys
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.groups import group, root
from registry.cli.console.render import JsonFlag
from registry.errors import NotFound, Usage
from registry.formats.references import parse_name
from registry.sdk.profile_file import LOCAL, Profile, Profiles

app = group("profile", "Manage saved registries and tokens.")


@root.command()
def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the registry.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the profile; by default, that of --profile, or the registry's host.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Save a registry's URL and token in a profile, and use it from now on.

    Prompts for the token, or reads it from stdin if that is not a terminal.
    """
    from registry.client.api import Api
    from registry.environment.home import with_secret
    from registry.environment.network import registry_url
    from registry.sdk.connection import load_settings

    try:
        address = registry_url(url)
    except ValueError as error:
        shown = "URL" if "@" in url else url  # may contain a password
        raise Usage("bad_url", f"{shown}: {error}.", subject=shown) from error
    settings = load_settings()
    profile_name = _profile_name(name or settings.profile, address)
    if profile_name == LOCAL:
        raise Usage("bad_profile", "local is the embedded registry.", subject=LOCAL)
    token = _read_token()
    own, secret = with_secret(settings.home_directory, address)
    api = Api(address, token=token) if token else Api(own, token=secret)
    try:
        user = api.get("/v1/whoami", wire.access.WhoOut).user
    finally:
        api.close()
    profiles = Profiles(settings.home_directory)
    profiles.known[profile_name] = Profile(profile_name, address, token)
    profiles.current = profile_name
    profiles.save()
    document = {"profile": profile_name, "url": address, "user": user}
    who = f"{user}, without a token" if token is None else user
    render.document(document, json, lambda: render.out(f"logged in to {address} as {who} (profile {profile_name})"))


@root.command()
def logout(
    name: Annotated[
        str | None, typer.Argument(metavar="[PROFILE]", help="By default, that of --profile, or the one in use.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Remove a profile and its token from this machine."""
    from registry.sdk.connection import load_settings

    settings = load_settings()
    profiles = Profiles(settings.home_directory)
    chosen = name or settings.profile or profiles.current
    if chosen is None:
        raise NotFound("profile_unknown", "No profile is in use.")
    removed = profiles.find(chosen)
    del profiles.known[chosen]
    profiles.current = None if profiles.current == chosen else profiles.current
    profiles.save()
    document = {"profile": chosen, "url": removed.url}
    render.document(
        document, json, lambda: render.out(f"removed the profile {chosen}; its token stays valid until revoked")
    )


@app.command("list")
def list_profiles(json: JsonFlag = False) -> None:
    """List the profiles, and which one is in use."""
    profiles = _profiles()
    items: list[dict[str, Any]] = [
        {
            "profile": profile.name,
            "url": profile.url,
            "token": bool(profile.token),
            "current": profile.name == profiles.current,
        }
        for profile in profiles.known.values()
    ]
    items.append({"profile": LOCAL, "url": None, "token": False, "current": profiles.current is None})
    rows = [(row["profile"], row["url"] or "embedded", "in use" if row["current"] else "") for row in items]
    render.listing(items, json, ("profile", "registry", ""), rows)


@app.command("use")
def use(
    name: Annotated[str, typer.Argument(metavar="PROFILE", help="As `adaptory profile list` shows it.")],
    json: JsonFlag = False,
) -> None:
    """Use a profile from now on; `local` is the embedded registry."""
    profiles = _profiles()
    profiles.current = None if name == LOCAL else profiles.find(name).name
    profiles.save()
    render.document({"profile": name}, json, lambda: render.out(f"profile {name} is in use"))


def _profiles() -> Profiles:
    from registry.sdk.connection import load_settings

    return Profiles(load_settings().home_directory)


def _profile_name(given: str | None, address: str) -> str:
    name = given or urlsplit(address).hostname or ""
    try:
        return parse_name(name, "profile")
    except Usage as error:
        if given:
            raise
        next_step = "Give the profile a name with --name."
        raise Usage(
            "bad_profile", f"{name} cannot be the name of a profile.", subject=name, next_step=next_step
        ) from error


def _read_token() -> str | None:
    """Reads the token from a prompt or stdin; arguments are visible to others and kept in shell histories."""
    from registry.environment.settings import stripped_token

    text = ""
    if sys.stdin and sys.stdin.isatty():
        text = typer.prompt("Token", hide_input=True, default="", show_default=False, err=True)
    elif sys.stdin:
        text = sys.stdin.read(10_000)
    try:
        return stripped_token(text) or None
    except ValueError as error:
        next_step = "Give the token alone, as `adaptory token create` printed it."
        raise Usage("bad_token", f"The token cannot be used: {error}.", subject="token", next_step=next_step) from error
