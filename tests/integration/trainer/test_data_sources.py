"""Rows from a real Postgres, an S3 API and a local Ray, each gone on with from any place."""

import datetime
import json
import uuid
from collections.abc import Iterator

import pyarrow
import pyarrow.fs
import pyarrow.parquet
import pytest
import sqlalchemy as sa
from moto.server import ThreadedMotoServer
from pydantic import TypeAdapter

from manylora_trainer.errors import SourceError
from manylora_trainer.source_factory import open_source
from manylora_trainer.source_settings import SourceSettings
from manylora_trainer.sources import Source
from tests.integration.postgres import start_postgres

ROWS = [{"id": i, "text": f"row {i}"} for i in range(23)]
SETTINGS = TypeAdapter(SourceSettings)


def opened(settings: dict) -> Source:
    return open_source(SETTINGS.validate_python(settings))


def goes_on_from(source: Source, places: range) -> list:
    """The rows, once it is seen that every reading from one of these places gives the rest."""
    whole = list(source.rows())
    for index in places:
        place = json.loads(json.dumps(whole[index].after))
        assert list(source.rows(place)) == whole[index + 1 :]
    return [row.columns for row in whole]


def by_id(rows: list) -> list:
    return sorted(rows, key=lambda row: row["id"])


# Postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[sa.URL]:
    server = start_postgres("manylora-rows-")
    url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE rows (id integer PRIMARY KEY, text text, day date, at timestamptz,"
            " token uuid, price numeric, code text, hour time, narrow real)"
        )
        connection.execute(
            sa.text(
                "INSERT INTO rows VALUES (:id, :text, :day, :at, :token, :price, :code, :hour,"
                " :narrow)"
            ),
            [
                {
                    **row,
                    "day": datetime.date(2026, 1, 1) + datetime.timedelta(row["id"]),
                    "at": datetime.datetime(2026, 1, 1, 12, 0, 0, row["id"], datetime.UTC),
                    "token": uuid.UUID(int=row["id"] * 7919),
                    "price": f"{row['id']}.10",
                    "hour": datetime.time(12, 0, row["id"], row["id"]),
                    "narrow": row["id"] / 10,
                    "code": "Ää b%s :c"[row["id"] % 9 :] + str(row["id"]),
                }
                for row in ROWS[::-1]
            ],
        )
        connection.exec_driver_sql("CREATE ROLE reader LOGIN PASSWORD 'hunter2'")
        connection.exec_driver_sql("GRANT SELECT ON rows TO reader")
    engine.dispose()
    yield url
    server.cleanup()


@pytest.mark.parametrize(
    ("column", "value"),
    [("day", "infinity"), ("day", "0044-03-15 BC"), ("at", "-infinity"), ("hour", "24:00")],
)
def test_a_date_or_time_python_cannot_hold_is_one_malformed_row(
    postgres, monkeypatch, column, value
):
    monkeypatch.setenv("ROWS_URL", postgres.render_as_string(hide_password=False))
    kind = {"day": "date", "at": "timestamptz", "hour": "time"}[column]
    query = f"SELECT id, CASE id WHEN 7 THEN '{value}'::{kind} ELSE {column} END AS d FROM rows"
    for page_rows in (3, 100):
        source = opened(
            {"kind": "sql", "url_env": "ROWS_URL", "query": query, "key": "id",
             "page_rows": page_rows}
        )  # fmt: skip
        found = list(source.rows())
        assert [row.number for row in found if row.error] == [8]
        assert str(found[7].error).startswith("query, row 8: id 7 cannot be read: ")
        assert [r.columns["id"] for r in found if not r.error] == [*range(7), *range(8, 23)]
        assert len(list(source.rows(found[7].after))) == 15


@pytest.mark.parametrize("key", ["id", "day", "at", "token", "price", "code", "hour"])
def test_a_table_is_paged_by_any_kind_of_key(postgres, monkeypatch, key):
    monkeypatch.setenv("ROWS_URL", postgres.render_as_string(hide_password=False))
    source = opened(
        {"kind": "sql", "url_env": "ROWS_URL", "table": "public.rows", "key": key, "page_rows": 5}
    )
    rows = goes_on_from(source, range(23))
    assert sorted(row["id"] for row in rows) == list(range(23))


@pytest.mark.parametrize(
    "key",
    [
        "(ARRAY['sad', 'ok', 'happy'])[id + 1]::mood",
        "(id * 1000)::money",
        "id = 1",
        "('08:00:2b:01:02:' || (10 - id))::macaddr",
    ],
)
def test_a_key_of_a_type_python_reads_as_another_is_paged(postgres, monkeypatch, key):
    """An enum or money is text in Python, and compares with no text in the database."""
    url = postgres.render_as_string(hide_password=False)
    monkeypatch.setenv("ROWS_URL", url)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("DROP TYPE IF EXISTS mood")
        connection.exec_driver_sql("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')")
    engine.dispose()
    count = 2 if key == "id = 1" else 3
    query = f"SELECT id, {key} AS key FROM rows WHERE id < {count}"
    source = opened(
        {"kind": "sql", "url_env": "ROWS_URL", "query": query, "key": "key", "page_rows": 1}
    )
    rows = goes_on_from(source, range(count))
    assert sorted(row["id"] for row in rows) == list(range(count))


@pytest.mark.parametrize("page_rows", [1, 2])
def test_a_key_greater_than_itself_is_refused(postgres, monkeypatch, page_rows):
    """0.1 as a `real` is greater than 0.1, so that a page would begin with the row before it."""
    monkeypatch.setenv("ROWS_URL", postgres.render_as_string(hide_password=False))
    settings = {"kind": "sql", "url_env": "ROWS_URL", "table": "rows", "key": "narrow"}
    with pytest.raises(SourceError, match=r"narrow 0\.\d for greater than itself"):
        list(opened({**settings, "page_rows": page_rows}).rows())


def test_a_key_that_is_not_found_again_beside_a_malformed_row_is_refused(postgres, monkeypatch):
    monkeypatch.setenv("ROWS_URL", postgres.render_as_string(hide_password=False))
    query = "SELECT narrow, CASE id WHEN 7 THEN 'infinity'::date ELSE day END AS day FROM rows"
    source = opened({"kind": "sql", "url_env": "ROWS_URL", "query": query, "key": "narrow"})
    with pytest.raises(SourceError, match=r"no row is found by narrow 0\.1.*choose another key"):
        list(source.rows())


def test_a_query_may_hold_what_drivers_take_for_parameters(postgres, monkeypatch):
    monkeypatch.setenv("ROWS_URL", postgres.render_as_string(hide_password=False))
    query = "SELECT id::bigint AS number, text FROM rows WHERE code LIKE '%:c%' AND id % 2 = 0;"
    source = opened(
        {"kind": "sql", "url_env": "ROWS_URL", "query": query, "key": "number", "page_rows": 3}
    )
    # Of the codes, every ninth from the eighth on ends before the colon.
    numbers = [i for i in range(0, 23, 2) if i % 9 != 8]
    assert [row["number"] for row in goes_on_from(source, range(5))] == numbers


def test_no_connection_is_held_between_pages(postgres, monkeypatch):
    """One would be lost with a server that starts again, or to a time limit for idle ones."""
    monkeypatch.setenv("ROWS_URL", postgres.render_as_string(hide_password=False))
    settings = {"kind": "sql", "url_env": "ROWS_URL", "table": "rows", "key": "id"}
    rows = opened({**settings, "page_rows": 5}).rows()
    next(rows)
    watcher = sa.create_engine(postgres)
    with watcher.connect() as connection:
        ended = connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).all()
    watcher.dispose()
    assert len(list(rows)) == 22
    assert ended == []


def test_an_error_of_the_database_never_tells_the_password(postgres, monkeypatch):
    monkeypatch.setenv("READER_PASSWORD", "hunter2")
    host = postgres.query["host"]
    url = f"postgresql+psycopg://reader:${{READER_PASSWORD}}@/none?host={host}"
    with pytest.raises(SourceError, match=r"cannot be read: .*none") as caught:
        list(opened({"kind": "sql", "url": url, "table": "rows", "key": "id"}).rows())
    assert "hunter2" not in str(caught.value)
    rows = opened(
        {"kind": "sql", "url": url.replace("/none", "/postgres"), "table": "rows", "key": "id"}
    ).rows()
    assert len(list(rows)) == 23


# S3


@pytest.fixture
def bucket(monkeypatch) -> Iterator[pyarrow.fs.S3FileSystem]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = pyarrow.fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    )
    files.create_dir("bucket")
    yield files
    server.stop()


def test_files_in_a_bucket_are_files(bucket):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, "bucket/a/rows.parquet", 5, filesystem=bucket)
    for name, rows in (("one", ROWS[:9]), ("two", ROWS[9:])):
        with bucket.open_output_stream(f"bucket/b/{name}.jsonl.gz") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    parquet = opened({"kind": "parquet", "path": "s3://bucket/**/*.parquet"})
    assert by_id(goes_on_from(parquet, range(0, 23, 5))) == ROWS
    jsonl = opened({"kind": "jsonl", "path": "s3://bucket/b/*.jsonl.gz"})
    assert by_id(goes_on_from(jsonl, range(0, 23, 5))) == ROWS
    for path, said in [
        ("s3://bucket/a/*.jsonl", "matches no file"),
        ("s3://bucket/none.jsonl", "cannot be read"),
        ("s3x://bucket/none.jsonl", "s3x"),
    ]:
        with pytest.raises(SourceError, match=said):
            list(opened({"kind": "jsonl", "path": path}).rows())


# Ray


def test_rows_of_ray_keep_their_order(tmp_path, monkeypatch):
    import ray

    # Of several processes that each import Ray, on a machine that may be busy.
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "150")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")

    (tmp_path / "rows.py").write_text(
        "import ray\n"
        "def rows():\n"
        "    def shout(row):\n"
        "        return {**row, 'text': row['text'].upper()}\n"
        f"    return ray.data.from_items({ROWS!r}, override_num_blocks=4).map(shout)\n"
        "def narrow():\n"
        "    import pyarrow\n"
        "    floats = pyarrow.array([0.1, 0.2], pyarrow.float32())\n"
        "    texts = pyarrow.array([b'\\xff', b'a']).cast(pyarrow.string(), safe=False)\n"
        "    return ray.data.from_arrow(pyarrow.table({'share': floats, 'text': texts}))\n"
        "def other():\n"
        "    return [1]\n"
        "def broken():\n"
        "    return ray.data.range(3).map(lambda row: {'x': 1 / 0})\n"
    )
    settings = {"kind": "ray", "file": str(tmp_path / "rows.py")}
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        rows = goes_on_from(opened({**settings, "function": "rows"}), range(10, 11))
        assert rows == [{**row, "text": row["text"].upper()} for row in ROWS]
        first, second = opened({**settings, "function": "narrow"}).rows()
        assert "row 1, field 'text': not UTF-8" in str(first.error)
        assert second.columns == {"share": 0.2, "text": "a"}
        with pytest.raises(SourceError, match=r"must return a ray\.data\.Dataset, returns list"):
            list(opened({**settings, "function": "other"}).rows())
        with pytest.raises(SourceError, match=r"failed after 0 rows: .*ZeroDivisionError"):
            list(opened({**settings, "function": "broken"}).rows())
    finally:
        ray.shutdown()
