"""Imported once by the process that the others are forked from."""

import alembic.command  # noqa: F401
import boto3  # noqa: F401
import psycopg  # noqa: F401
import uvicorn.protocols.http.h11_impl
import uvicorn.protocols.websockets.auto  # noqa: F401

import registry.cli.main
import registry.cli.server
import registry.client.push
import registry.fsck
import registry.storage.s3
import registry.upkeep
import registry.web.app
import registry.worker.loop
import registry.worker.steps  # noqa: F401
