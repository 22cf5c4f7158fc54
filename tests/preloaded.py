"""Imported once by the process that the others are forked from."""

import alembic.command  # noqa: F401
import boto3  # noqa: F401
import psycopg  # noqa: F401
import uvicorn.protocols.http.h11_impl
import uvicorn.protocols.websockets.auto  # noqa: F401

import registry.api.app
import registry.cli.main
import registry.cli.server
import registry.client.push
import registry.storage.s3.store
import registry.transfer.collect
import registry.transfer.fsck
import registry.worker.runner
import registry.worker.steps

registry.api.app.routers()
