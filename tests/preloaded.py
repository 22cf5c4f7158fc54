"""Imported once by the process that others are forked from: torch and transformers take a worker 3.6 s of CPU."""

import gc
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import alembic.command  # noqa: F401
import anyio._backends._asyncio  # noqa: F401
import boto3
import botocore.session
import psycopg  # noqa: F401
import torch  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401
import typer.main
import uvicorn.loops.auto
import uvicorn.protocols.http.h11_impl
import uvicorn.protocols.websockets.auto  # noqa: F401
import uvloop  # noqa: F401

import registry.agent.loop
import registry.agent.switching
import registry.api.app
import registry.api.http.metrics
import registry.api.http.protocol
import registry.cli.operations.server
import registry.cli.start
import registry.client.push
import registry.storage.s3.store
import registry.transfer.collect
import registry.transfer.fsck
import registry.transfer.resources
import registry.worker.engine.template
import registry.worker.runner
import registry.worker.steps
from tests import forked, services
from tests.access import house

for routers in (registry.api.app.routers, registry.api.app.hub_routers, registry.api.app.page_routers):
    routers()
# A process need not build the command line, read boto3's 2 MB description of S3, migrate, or collect garbage that it
# was forked with.
registry.transfer.resources.ensure_schema = partial(services.ensure_schema_by_copy, services.shared_directory())
registry.worker.engine.template.launch = forked.launch_template
typer.main.get_command = lru_cache(typer.main.get_command)
typer.main.get_command(registry.cli.start.load_commands())
botocore.session.create_loader = lru_cache(botocore.session.create_loader)
boto3.Session().client("s3", region_name="us-east-1")
# Agents wait less for the next figures of a canary, and for the next check of a version that failed one.
registry.agent.loop.WATCH_S = 1.0
registry.agent.switching.CHECK_AGAIN_S["failed"] = 2.0
# Nor compile the statements of a publication again, which takes as long as all else of a push.
services.share_statements(setattr)
with TemporaryDirectory(dir=services.shared_directory()) as directory:
    house.publish_once(Path(directory))
gc.freeze()
