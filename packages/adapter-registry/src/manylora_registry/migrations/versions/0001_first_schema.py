"""Adapters, versions, aliases with their moves, events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "adapters",
        sa.Column("id", ID, primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("name", name="uq_adapters_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "versions",
        sa.Column("id", ID, primary_key=True),
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("base_fingerprint", sa.String(71), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("yanked_at", sa.BigInteger),
        sa.UniqueConstraint("adapter_id", "number", name="uq_versions_adapter_id_number"),
        sa.UniqueConstraint("adapter_id", "digest", name="uq_versions_adapter_id_digest"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "version_metrics",
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.Float, nullable=False),
    )
    op.create_index("ix_version_metrics_key_value", "version_metrics", ["key", "value"])
    op.create_table(
        "version_labels",
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String, nullable=False),
    )
    op.create_index("ix_version_labels_kind_key_value", "version_labels", ["kind", "key", "value"])
    op.create_table(
        "version_blobs",
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("digest", sa.String(71), primary_key=True),
    )
    op.create_index("ix_version_blobs_digest", "version_blobs", ["digest"])
    op.create_table(
        "aliases",
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", ID, primary_key=True),
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("previous", sa.Integer),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("why", sa.String, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("chain", sa.String(71), nullable=False),
        sa.UniqueConstraint(
            "adapter_id", "alias", "generation", name="uq_alias_moves_adapter_id_alias_generation"
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"], ["versions.adapter_id", "versions.number"]
        ),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "events",
        sa.Column("sequence", ID, primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("alias", sa.String(64)),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    """The first schema has nothing below it."""
    raise NotImplementedError("there is no schema before the first")
