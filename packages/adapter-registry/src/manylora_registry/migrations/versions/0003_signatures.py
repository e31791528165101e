"""Signatures of versions."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Adds a table."""
    op.create_table(
        "signatures",
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Migrations go one way."""
    raise NotImplementedError("restore a backup from before the upgrade")
