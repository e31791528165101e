"""The tables.

Moves, evaluations, protections, deployments and events are only ever added to, and no version's
row goes away: one whose bytes were collected keeps its number and its history.

Times are microseconds since 1970 UTC: exact, ordered, and the same on every database.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts up by itself only in an INTEGER column, elsewhere 32 bits would run out.
_Id = BigInteger().with_variant(Integer(), "sqlite")


def _text(length: int | None = None) -> String:
    """Text that is ordered by its bytes on every database."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


adapters = Table(
    "adapters",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", _text(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

versions = Table(
    "versions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("adapter_id", _Id, ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", _text(71), nullable=False),
    Column("base_fingerprint", String(71), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("yanked_at", BigInteger),
    Column("revision", Integer, nullable=False, server_default="0"),
    Column("deleted_at", BigInteger),
    Column("collected_at", BigInteger),
    UniqueConstraint("adapter_id", "number"),
    UniqueConstraint("adapter_id", "digest"),
    Index(None, "created_at", "id"),
    # Of the few that are deleted: one over all would be taken by queries for those that are not.
    Index(
        None,
        "deleted_at",
        sqlite_where=text("deleted_at IS NOT NULL"),
        postgresql_where=text("deleted_at IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)

version_metrics = Table(
    "version_metrics",
    metadata,
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Column("key", _text(64), primary_key=True),
    Column("value", Float, nullable=False),
    Index(None, "key", "value", "version_id"),
)

version_labels = Table(
    "version_labels",
    metadata,
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("key", _text(64), primary_key=True),
    Column("value", _text(), nullable=False),
    Index(None, "kind", "key", "value", "version_id"),
)

version_parents = Table(
    "version_parents",
    metadata,
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Column("parent_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Index(None, "parent_id"),
)

version_blobs = Table(
    "version_blobs",
    metadata,
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Column("digest", String(71), primary_key=True),
    Index(None, "digest"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", _Id, ForeignKey("adapters.id"), primary_key=True),
    Column("alias", _text(64), primary_key=True),
    Column("version_id", _Id, ForeignKey("versions.id"), nullable=False),
    Column("generation", Integer, nullable=False),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("adapter_id", _Id, ForeignKey("adapters.id"), nullable=False),
    Column("alias", String(64), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("previous", Integer),
    Column("actor", String, nullable=False),
    Column("why", String, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("chain", String(71), nullable=False),
    Column("override", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("adapter_id", "alias", "generation"),
    ForeignKeyConstraint(["adapter_id", "version"], ["versions.adapter_id", "versions.number"]),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    Column("sequence", _Id, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("adapter_id", _Id, ForeignKey("adapters.id"), nullable=False),
    Column("alias", String(64)),
    Column("version", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

signatures = Table(
    "signatures",
    metadata,
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Column("digest", String(71), primary_key=True),
    Column("at", BigInteger, nullable=False),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("version_id", _Id, ForeignKey("versions.id"), nullable=False),
    Column("suite", _text(64), nullable=False),
    Column("passed", Boolean, nullable=False),
    Column("result", Text, nullable=False),
    Column("actor", String, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index(None, "version_id", "suite"),
    sqlite_autoincrement=True,
)

protections = Table(
    "protections",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("adapter_id", _Id, ForeignKey("adapters.id"), nullable=False),
    Column("alias", _text(64), nullable=False),
    Column("suite", _text(64)),
    Column("protected", Boolean, nullable=False),
    Column("actor", String, nullable=False),
    Column("why", String, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index(None, "adapter_id", "alias"),
    sqlite_autoincrement=True,
)

deployments = Table(
    "deployments",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key", _text(128), nullable=False, unique=True),
    Column("stage", _text(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("step", String, nullable=False),
    Column("outcome", String(64), nullable=False),
    Column("adapter_id", _Id, ForeignKey("adapters.id")),
    Column("version", Integer),
    Column("digest", String(71)),
    Column("actor", String, nullable=False),
    Column("why", String, nullable=False),
    Column("detail", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("chain", String(71), nullable=False),
    Index(None, "adapter_id", "stage"),
    sqlite_autoincrement=True,
)

leases = Table(
    "leases",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("holder", String, nullable=False),
    Column("version_id", _Id, ForeignKey("versions.id")),
    Column("expires_at", BigInteger, nullable=False),
    Index(None, "version_id"),
)

lease_blobs = Table(
    "lease_blobs",
    metadata,
    Column("lease_id", String(32), ForeignKey("leases.id"), primary_key=True),
    Column("digest", String(71), primary_key=True),
    Index(None, "digest"),
)

condemned = Table(
    "condemned",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("at", BigInteger, nullable=False),
)
