import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL

from manylora_registry import Registry, migrations, schema
from manylora_registry.database import Database
from manylora_registry.errors import SchemaTooNewError


def test_the_migrations_lead_to_the_tables_in_use(tmp_path):
    database = Database(URL.create("sqlite", database=str(tmp_path / "registry.sqlite")))

    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, schema.metadata) == []


def test_every_migration_is_listed():
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    revisions = [script.revision for script in scripts.walk_revisions()]

    assert tuple(reversed(revisions)) == migrations.REVISIONS


def test_a_newer_schema_is_refused_and_left_alone(tmp_path):
    Registry.open(tmp_path / "registry").close()
    file = tmp_path / "registry" / "registry.sqlite"
    with sqlite3.connect(file) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    before = file.read_bytes()

    with pytest.raises(SchemaTooNewError, match="9999"):
        Registry.open(tmp_path / "registry")
    assert file.read_bytes() == before


def test_writers_exclude_each_other_and_readers_do_not_wait(tmp_path):
    database = Database(URL.create("sqlite", database=str(tmp_path / "registry.sqlite")))
    with sqlite3.connect(tmp_path / "registry.sqlite", timeout=0) as other:
        other.isolation_level = None
        with database.write():
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            assert other.execute("SELECT count(*) FROM adapters").fetchone() == (0,)


def test_the_database_is_set_to_lose_nothing(tmp_path):
    database = Database(URL.create("sqlite", database=str(tmp_path / "registry.sqlite")))

    with database.read() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]


def test_a_failed_transaction_leaves_nothing(tmp_path):
    database = Database(URL.create("sqlite", database=str(tmp_path / "registry.sqlite")))

    def write_and_fail():
        with database.write() as connection:
            connection.execute(sa.insert(schema.adapters).values(name="a", created_at=0))
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    with database.read() as connection:
        assert connection.execute(sa.select(schema.adapters)).all() == []
