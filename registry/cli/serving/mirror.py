"""Mirrors channels: keeps a directory, and the servers on this host, in step with what channels serve."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from registry.cli.console import complete, render
from registry.cli.console.connect import connected
from registry.cli.console.groups import root
from registry.cli.serving.routing import address, http_url
from registry.errors import RegistryError, Unavailable, Usage
from registry.formats.references import parse_node_name, parse_reference
from registry.formats.watch import parse_duration

if TYPE_CHECKING:
    from registry.agent.directory import MirrorDirectory, Signer
    from registry.agent.loop import GroupNode
    from registry.agent.servers.protocol import HttpServer, Server
    from registry.agent.versions import ServedVersion
    from registry.client.api import Api
    from registry.formats.evidence import EvidenceExample
    from registry.wire.search import AnyRelease

Channels = Annotated[
    list[str],
    typer.Argument(metavar="REPO@CHANNEL...", help="Such as acme/sql@prod.", autocompletion=complete.channels),
]
Target = Annotated[Path, typer.Argument(metavar="DIR", help="Where releases, routes.json and state.json are kept.")]
Servers = Annotated[
    list[str] | None,
    typer.Option(
        "--server",
        metavar="KIND=ADDRESS",
        help="vllm=URL, sglang=URL, llamacpp='llama-server -m BASE.gguf --port FIRST-LAST', exec=COMMAND, or "
        "directory[=BASE_NAME] for servers that watch DIR/by-version. May be repeated.",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        min=0.3,
        max=1.0,
        help="How far a token's log-probability may be off on servers of quantized bases; by default 0.3.",
    ),
]
Fronts = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="A front whose requests under way count, too. May be repeated: name every front."),
]
Verify = Annotated[Path | None, typer.Option(metavar="PUB.pem", help="Serve only releases that this key signed.")]
Keep = Annotated[int, typer.Option(min=0, help="Earlier releases whose files are kept, for each channel.")]
Grace = Annotated[str, typer.Option(metavar="TIME", help="How long the files of every earlier release are kept.")]
OnEmpty = Annotated[
    str, typer.Option(metavar="keep|unload", help="What to do with the last version of a channel that serves nothing.")
]
Listen = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Answer /healthz and /metrics here.")]
Group = Annotated[str | None, typer.Option(help="Report to the registry as a node of this group.")]
NodeName = Annotated[str | None, typer.Option("--node", help="The node's name; by default, the name of this host.")]
MaxUnavailable = Annotated[
    int | None, typer.Option("--max-unavailable", min=1, help="How many nodes of the group may switch at a time.")
]
Write = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FORM=FILE",
        help="Also write the routes for a gateway: litellm, llm-d, envoy, kserve or aibrix. May be repeated.",
    ),
]
Pool = Annotated[str, typer.Option(help="The pool, backend or service that --write names.")]
Gateway = Annotated[
    str,
    typer.Option(
        metavar="[NAMESPACE/]NAME", show_default=False, help="The Gateway of the routes that --write envoy=FILE writes."
    ),
]


@root.command()
def mirror(  # noqa: PLR0913
    channels: Channels,
    directory: Target,
    server: Servers = None,
    tolerance: Tolerance = None,
    front: Fronts = None,
    verify: Verify = None,
    keep: Keep = 2,
    grace: Grace = "10m",
    on_empty: OnEmpty = "keep",
    listen: Listen = None,
    group: Group = None,
    node: NodeName = None,
    max_unavailable: MaxUnavailable = None,
    write: Write = None,
    pool: Pool = "vllm",
    gateway: Gateway = "",
) -> None:
    """Keep servers on this host in step with what channels serve, until interrupted.

    Each version is loaded under its own name, such as acme/sql@1.2.0, from a verified directory; then DIR/routes.json
    routes the channel to it. The old version is unloaded when no request uses it any more. While the registry is
    unreachable, servers keep their current releases.
    """
    from registry.agent import health, loop
    from registry.agent.directory import MirrorDirectory
    from registry.agent.gateways import GatewayFile, GatewayTarget, write_all
    from registry.agent.mirror import Duties, Mirror, Options
    from registry.agent.servers.protocol import HttpServer
    from registry.agent.switching import KeptServer
    from registry.client.follow import channel_names

    names = channel_names(channels)
    fronts = [HttpServer(http_url(url)) for url in dict.fromkeys(front or ())]
    if on_empty not in ("keep", "unload"):
        raise Usage("bad_server", f"--on-empty {on_empty} is unknown.", subject=on_empty, next_step="keep or unload.")
    named = _node(group, node, max_unavailable)
    files = [GatewayFile(text, GatewayTarget(pool, gateway)) for text in write or ()]
    splits = bool(fronts) or any(file.splits for file in files)
    options = Options(keep, parse_duration(grace), on_empty == "unload", splits=splits)
    kept_in, state = MirrorDirectory(directory), health.Health()
    opened, listens_at = _servers(server, kept_in, tolerance), address(listen) if listen else None
    with ExitStack() as stack:
        api = stack.enter_context(connected()).api
        signer = _signer(api, verify) if verify else None
        stack.enter_context(kept_in.locked())
        if listens_at is not None:
            stack.callback(health.serve(state, *listens_at))
        busy, evidence = partial(_busy_in, fronts) if fronts else None, partial(_evidence, api)
        servers = [KeptServer(kept, kept_in, busy, options.grace_s, evidence) for kept in opened]
        reporter = loop.Reporter(api, named, state) if named else None
        duties = Duties(signer, reporter.may_switch if reporter else lambda: True, partial(write_all, files))
        mirrored = Mirror(api, kept_in, servers, options, duties)
        stack.callback(mirrored.close)
        followed = loop.Followed(api, names, state, render.say)
        watcher = loop.Watcher(api, followed, fronts, _source(named), state) if fronts else None
        loop.run(mirrored, followed, reporter, watcher, state)


def _node(group: str | None, node: str | None, max_unavailable: int | None) -> "GroupNode | None":
    """The node that reports; None without a group."""
    from registry.agent.loop import GroupNode

    if group is not None:
        name = parse_node_name(node or socket.gethostname().lower(), "node")
        return GroupNode(parse_node_name(group, "group"), name, max_unavailable)
    if max_unavailable is not None:
        raise Usage("idle_option", "--max-unavailable counts the nodes of a --group.", subject="--max-unavailable")
    return None


def _source(node: "GroupNode | None") -> str:
    """The name under which the fronts' figures are reported."""
    return f"{node.group}/{node.name}" if node else socket.gethostname().lower()


def _servers(texts: Sequence[str] | None, directory: "MirrorDirectory", tolerance: float | None) -> "Sequence[Server]":
    """The servers that `--server` names; DIR/by-version if none is named."""
    from registry.agent.servers.command import CommandServer
    from registry.agent.servers.files import DirectoryServer
    from registry.agent.servers.llamacpp import LlamaServer
    from registry.agent.servers.sglang import SglangServer
    from registry.agent.servers.vllm import VllmServer
    from registry.formats.evidence import USUAL, Tolerance
    from registry.wire.fleet import MAX_SERVERS

    opened: list[Server] = []
    limits = USUAL if tolerance is None else Tolerance.within(tolerance)
    if len(texts or ()) > MAX_SERVERS:
        raise Usage("bad_server", f"More than {MAX_SERVERS} servers are named.", subject="--server")
    for text in texts or ["directory"]:
        kind, _, address = text.partition("=")
        if kind == "directory":
            opened.append(DirectoryServer(directory, address or None))
        elif kind in ("vllm", "sglang"):
            opened.append((VllmServer if kind == "vllm" else SglangServer)(http_url(address), limits))
        elif kind == "llamacpp":
            opened.append(LlamaServer(address, directory, limits))
        elif kind == "exec":
            opened.append(CommandServer(address))
        else:
            raise Usage("bad_server", f"--server {text} is unknown.", subject=text)
    return opened


def _signer(api: "Api", key: Path) -> "Signer":
    """Raises Invalid for a key that cannot verify."""
    from registry.agent.directory import Signer
    from registry.client.signing import read_public_key, verify_release
    from registry.formats.signatures import fingerprint

    public_key = read_public_key(key)

    def verify(release: "AnyRelease", files: Path) -> None:
        asked = parse_reference(f"{release.repository}:{release.version}")
        verify_release(api, release, asked, files, public_key)

    return Signer(fingerprint(public_key), verify)


def _evidence(api: "Api", version: "ServedVersion") -> "Sequence[EvidenceExample] | None":
    """The evidence of a version, checked on this machine; None without any, and while the registry is away."""
    from registry.client.attestations import checked_evidence

    try:
        release = api.resolve(parse_reference(version.reference)).release
        return checked_evidence(api, release) if release.commit == version.commit else None
    except RegistryError as error:
        if error.code != "evidence_unknown":
            render.say(f"{version.name} is not proved: {error.detail}")
        return None


def _busy_in(fronts: "Sequence[HttpServer]") -> frozenset[str]:
    """Names that the fronts' requests under way use. Raises Unavailable if one of them does not answer."""
    from registry.agent.front import UNDER_WAY

    names = set[str]()
    for front in fronts:
        document = front.document(UNDER_WAY)
        if not isinstance(document, dict):
            detail = f"{front.address}{UNDER_WAY} does not answer as a front does."
            raise Unavailable("server_unreachable", detail, subject=front.address)
        names |= cast(dict[str, int], document).keys()
    return frozenset(names)
