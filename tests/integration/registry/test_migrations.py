"""Registries of every schema there has been are brought to the present one with all they hold."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from manylora_registry import migrations, schema
from manylora_registry.errors import SchemaTooNewError


def migrate_to(connection, revision):
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


@pytest.fixture
def raw(database):
    engine = sa.create_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def first_schema(place, raw, publish, registry, tmp_path):
    """A registry of the first schema: the rows of a present one, in the columns there were."""
    publish(1, metrics={"loss": 0.5}, tags={"lang": "en"}, lineage={"run": "r1"})
    publish(2)
    registry.set_alias("spelling", "production", 1, actor="ann", why="first")
    registry.set_alias("spelling", "production", 2)
    registry.yank("spelling@1")
    saw = (registry.versions("spelling"), registry.history("spelling"), registry.events())
    registry.close()
    with raw.connect() as connection:
        rows = {
            table.name: connection.execute(sa.select(table)).mappings().all()
            for table in schema.metadata.sorted_tables
        }
    with raw.begin() as connection:
        if raw.dialect.name == "postgresql":
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
        else:
            names = [*reversed([*schema.metadata.tables]), "alembic_version"]
            for name in names:
                connection.exec_driver_sql(f"DROP TABLE {name}")
        migrate_to(connection, "0001")
        then = sa.MetaData()
        then.reflect(connection)
        for table in then.sorted_tables:
            for row in rows.get(table.name, []):
                columns = {name: row[name] for name in row if name in table.c}
                connection.execute(sa.insert(table).values(columns))
        if raw.dialect.name == "postgresql":
            for table, column in (
                ("adapters", "id"),
                ("versions", "id"),
                ("alias_moves", "id"),
                ("events", "sequence"),
            ):
                connection.exec_driver_sql(
                    f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), 100)"
                )
    return saw


def test_the_first_schema_is_migrated_with_its_data(first_schema, place, base, make_adapter):
    with place.open() as registry:
        assert (
            registry.versions("spelling"),
            registry.history("spelling"),
            registry.events(),
        ) == first_schema
        assert registry.verify().problems == ()
        registry.publish("spelling", make_adapter(3), base=base, parent="spelling@2")
        registry.set_alias("spelling", "production", 3, expect=2)
        registry.delete("spelling@1")
        registry.collect_garbage()
        assert registry.verify().problems == ()


def test_a_newer_schema_is_refused_and_left_alone(place, raw):
    place.open().close()
    with raw.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(SchemaTooNewError, match="9999"):
        place.open()
    with raw.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == (
            "9999"
        )


def test_the_tables_are_those_in_use_on_every_database(place, raw):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    place.open().close()
    with raw.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, schema.metadata) == []
