"""${message}"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
oldest_code = ${repr(down_revision)}  # the newest migration of the oldest code that works with this one


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}
