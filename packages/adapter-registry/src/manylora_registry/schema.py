"""The tables. Versions, moves and events are only ever added to.

Times are microseconds since 1970 UTC: exact, ordered, and the same on every database.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
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

adapters = Table(
    "adapters",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

versions = Table(
    "versions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("adapter_id", _Id, ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("base_fingerprint", String(71), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("yanked_at", BigInteger),
    UniqueConstraint("adapter_id", "number"),
    UniqueConstraint("adapter_id", "digest"),
    sqlite_autoincrement=True,
)

version_metrics = Table(
    "version_metrics",
    metadata,
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", Float, nullable=False),
    Index(None, "key", "value"),
)

version_labels = Table(
    "version_labels",
    metadata,
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String, nullable=False),
    Index(None, "kind", "key", "value"),
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
    Column("alias", String(64), primary_key=True),
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
