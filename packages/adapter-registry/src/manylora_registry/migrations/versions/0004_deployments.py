"""Records of what was done to stages."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def text(length: int | None = None) -> sa.String:
    """Text that is ordered by its bytes."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    """Adds a table."""
    op.create_table(
        "deployments",
        sa.Column("id", ID, primary_key=True),
        sa.Column("key", text(128), nullable=False),
        sa.Column("stage", text(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("step", sa.String, nullable=False),
        sa.Column("outcome", sa.String(64), nullable=False),
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id")),
        sa.Column("version", sa.Integer),
        sa.Column("digest", sa.String(71)),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("why", sa.String, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("chain", sa.String(71), nullable=False),
        sa.UniqueConstraint("key", name="uq_deployments_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deployments_adapter_id_stage", "deployments", ["adapter_id", "stage"])


def downgrade() -> None:
    """Migrations go one way."""
    raise NotImplementedError("restore a backup from before the upgrade")
