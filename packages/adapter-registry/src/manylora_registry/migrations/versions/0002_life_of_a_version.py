"""Parents, evaluations, protected aliases, leases, and versions that are deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ORDERED = (
    ("adapters", "name", "VARCHAR(64)"),
    ("versions", "digest", "VARCHAR(71)"),
    ("version_metrics", "key", "VARCHAR(64)"),
    ("version_labels", "key", "VARCHAR(64)"),
    ("version_labels", "value", "VARCHAR"),
    ("aliases", "alias", "VARCHAR(64)"),
)
"""Columns that are compared and sorted: by their bytes, whatever the database's language is."""


def text(length: int | None = None) -> sa.String:
    """Text that is ordered by its bytes."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    """Adds columns and tables; no row that is there changes."""
    if op.get_bind().dialect.name == "postgresql":
        for table, column, kind in ORDERED:
            op.execute(f'ALTER TABLE {table} ALTER COLUMN {column} TYPE {kind} COLLATE "C"')
    op.add_column("versions", sa.Column("revision", sa.Integer, nullable=False, server_default="0"))
    op.add_column("versions", sa.Column("deleted_at", sa.BigInteger))
    op.add_column("versions", sa.Column("collected_at", sa.BigInteger))
    op.create_index("ix_versions_created_at_id", "versions", ["created_at", "id"])
    deleted = sa.text("deleted_at IS NOT NULL")
    op.create_index(
        "ix_versions_deleted_at",
        "versions",
        ["deleted_at"],
        sqlite_where=deleted,
        postgresql_where=deleted,
    )
    op.drop_index("ix_version_metrics_key_value", "version_metrics")
    op.create_index(
        "ix_version_metrics_key_value_version_id", "version_metrics", ["key", "value", "version_id"]
    )
    op.drop_index("ix_version_labels_kind_key_value", "version_labels")
    op.create_index(
        "ix_version_labels_kind_key_value_version_id",
        "version_labels",
        ["kind", "key", "value", "version_id"],
    )
    op.create_table(
        "version_parents",
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("parent_id", ID, sa.ForeignKey("versions.id"), primary_key=True),
    )
    op.create_index("ix_version_parents_parent_id", "version_parents", ["parent_id"])
    op.add_column(
        "alias_moves",
        sa.Column("override", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", ID, primary_key=True),
        sa.Column("version_id", ID, sa.ForeignKey("versions.id"), nullable=False),
        sa.Column("suite", text(64), nullable=False),
        sa.Column("passed", sa.Boolean, nullable=False),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_evaluations_version_id_suite", "evaluations", ["version_id", "suite"])
    op.create_table(
        "protections",
        sa.Column("id", ID, primary_key=True),
        sa.Column("adapter_id", ID, sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("alias", text(64), nullable=False),
        sa.Column("suite", text(64)),
        sa.Column("protected", sa.Boolean, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("why", sa.String, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_protections_adapter_id_alias", "protections", ["adapter_id", "alias"])
    op.create_table(
        "leases",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("version_id", ID, sa.ForeignKey("versions.id")),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_leases_version_id", "leases", ["version_id"])
    op.create_table(
        "lease_blobs",
        sa.Column("lease_id", sa.String(32), sa.ForeignKey("leases.id"), primary_key=True),
        sa.Column("digest", sa.String(71), primary_key=True),
    )
    op.create_index("ix_lease_blobs_digest", "lease_blobs", ["digest"])
    op.create_table(
        "condemned",
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Leases and deletions cannot be told to a library that knows none."""
    raise NotImplementedError("a registry is not taken back to an older schema; restore a backup")
