"""Every source keeps its order, goes on exactly from any place, and names what is bad."""

import gzip
import json
import re
import sqlite3
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from pydantic import TypeAdapter

from manylora_registry.errors import ConfigError
from manylora_trainer import load_recipe
from manylora_trainer.errors import NoExamplesError, SourceError
from manylora_trainer.jsonl import JsonLines
from manylora_trainer.python_source import PythonFunction
from manylora_trainer.source_factory import open_source
from manylora_trainer.source_settings import SourceSettings

ROWS = [{"id": i, "text": f"row {i} " + "x" * (i % 7)} for i in range(23)]
SETTINGS = TypeAdapter(SourceSettings)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def jsonl(directory):
    (directory / "a.jsonl").write_bytes(lines(ROWS[:9]))
    (directory / "b.jsonl").write_bytes(b"\n" + lines(ROWS[9:]).rstrip(b"\n"))
    return {"kind": "jsonl", "path": str(directory / "*.jsonl")}


def gzipped(directory):
    (directory / "a.jsonl.gz").write_bytes(
        gzip.compress(lines(ROWS[:9])) + gzip.compress(lines(ROWS[9:]))
    )
    return {"kind": "jsonl", "path": [str(directory / "a.jsonl.gz")]}


def zstandardised(directory):
    with pyarrow.CompressedOutputStream(str(directory / "a.jsonl.zst"), "zstd") as file:
        file.write(lines(ROWS))
    return {"kind": "jsonl", "path": str(directory / "a.jsonl.zst")}


def by_uri(directory):
    jsonl(directory)
    return {"kind": "jsonl", "path": f"file://{directory}/*.jsonl"}


def parquet(directory):
    for name, rows in (("a", ROWS[:10]), ("b", []), ("c", ROWS[10:])):
        table = pyarrow.Table.from_pylist(
            rows, pyarrow.schema({"id": pyarrow.int64(), "text": pyarrow.string()})
        )
        pyarrow.parquet.write_table(table, directory / f"{name}.parquet", row_group_size=4)
    paths = [str(directory / "a.parquet"), str(directory / "**" / "[bc].parquet*")]
    return {"kind": "parquet", "path": paths}


def database(directory):
    with sqlite3.connect(directory / "rows.db") as connection:
        connection.execute("create table things (id integer, text text)")
        shuffled = sorted(ROWS, key=lambda row: row["id"] * 7 % 23)
        connection.executemany("insert into things values (:id, :text)", shuffled)
    return directory / "rows.db"


def sql_table(directory):
    url = f"sqlite:///{database(directory)}"
    return {"kind": "sql", "url": url, "table": "things", "key": "id", "page_rows": 5}


def sql_query(directory):
    query = "select id, text from things where text <> ':none' ;"
    return {
        "kind": "sql",
        "url": f"sqlite:///{database(directory)}",
        "query": query,
        "key": "text",
        "page_rows": 23,
    }


def function(directory):
    (directory / "rows.py").write_text(f"def rows():\n    yield from {ROWS!r}\n")
    return {"kind": "python", "file": str(directory / "rows.py"), "function": "rows"}


def saved_dataset(directory):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        str(directory / "saved")
    )
    return {"kind": "datasets", "path": str(directory / "saved")}


def built_dataset(directory):
    (directory / "rows.csv").write_text(
        "id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in ROWS)
    )
    return {"kind": "datasets", "builder": "csv", "path": str(directory / "rows.csv")}


def mix(directory):
    (directory / "few.jsonl").write_bytes(lines({"id": 100 + i, "text": "few"} for i in range(3)))
    return {
        "kind": "mix",
        "sources": [
            {"weight": 3, "source": jsonl_of(directory, "many", ROWS)},
            {"weight": 1, "source": {"kind": "jsonl", "path": str(directory / "few.jsonl")}},
        ],
    }


SLOW = (saved_dataset, built_dataset)
"""Libraries that take a while for each reading: fewer places are tried."""


def jsonl_of(directory, name, rows):
    (directory / f"{name}.jsonl").write_bytes(lines(rows))
    return {"kind": "jsonl", "path": str(directory / f"{name}.jsonl")}


def opened(settings, seed="s"):
    return open_source(SETTINGS.validate_python(settings), seed)


@pytest.mark.parametrize(
    "make",
    [
        *(jsonl, gzipped, zstandardised, by_uri, parquet, sql_table, sql_query),
        *(function, saved_dataset, built_dataset, mix),
    ],
)
def test_a_reading_goes_on_exactly_from_any_place(make, tmp_path):
    source = opened(make(tmp_path))
    whole = list(source.rows())
    if make is not mix:
        assert sorted(row.columns["id"] for row in whole) == list(range(23))
        assert {row.columns["id"]: row.columns["text"].strip() for row in whole} == {
            row["id"]: row["text"].strip() for row in ROWS
        }
    for index in {6, len(whole) - 1} if make in SLOW else range(len(whole)):
        place = json.loads(json.dumps(whole[index].after))
        assert list(source.rows(place)) == whole[index + 1 :]


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(("end", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_a_reading_never_goes_on_within_a_line(tmp_path, end, pack):
    path = tmp_path / f"a.jsonl{end}"
    source = opened({"kind": "jsonl", "path": str(path)})
    path.write_bytes(pack(lines(ROWS)))
    place = list(source.rows())[4].after
    path.write_bytes(pack(lines([{"id": 23}, *ROWS])))
    with pytest.raises(SourceError, match=rf"a\.jsonl{end} is not as it was: behind row 5, where"):
        next(iter(source.rows(place)))


@pytest.mark.parametrize("more", ["", "\n", "\r\n", '\n{"id": 23}'])
def test_a_reading_goes_on_behind_a_last_line_without_end(tmp_path, more):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS).strip())
    source = opened({"kind": "jsonl", "path": str(path)})
    *_, last = source.rows()
    with path.open("a") as file:
        file.write(more)
    assert [row.columns for row in source.rows(last.after)] == [{"id": 23}] * ("id" in more)


def test_a_long_file_is_not_held_in_memory(tmp_path):
    """A file three times as large as what the process may have."""
    script = """
import resource, sys
from manylora_trainer.jsonl import JsonLines
import pyarrow
list(JsonLines([sys.argv[2]]).rows())
with open("/proc/self/statm") as statm:
    now = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (32 << 20), -1))
print(sum(len(row.columns["text"]) for row in JsonLines([sys.argv[1]]).rows()))
"""
    path, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    short.write_bytes(lines(ROWS))
    line = json.dumps({"text": "x" * 1_000_000}) + "\n"
    with path.open("w") as file:
        for _ in range(96):
            file.write(line)
    done = subprocess.run(
        [sys.executable, "-c", script, path, short], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "96000000", done.stderr


# Mix


def test_a_mix_draws_by_weight_and_by_its_seed_alone(tmp_path):
    settings = {
        "kind": "mix",
        "sources": [
            {"weight": 3, "source": jsonl_of(tmp_path, "a", [{"from": "a"}] * 3000)},
            {"weight": 1, "source": jsonl_of(tmp_path, "b", [{"from": "b"}] * 100)},
        ],
    }
    drawn = [row.columns["from"] for row in opened(settings).rows()]
    # The larger one is read once, so the smaller one ten times.
    assert drawn.count("a") == 3000
    assert 850 < drawn.count("b") < 1150
    assert drawn == [row.columns["from"] for row in opened(settings).rows()]
    assert drawn != [row.columns["from"] for row in opened(settings, "other").rows()]


def test_an_empty_part_of_a_mix_is_told(tmp_path):
    parts = [jsonl_of(tmp_path, "a", ROWS), jsonl_of(tmp_path, "none", [])]
    # Drawn soon, and so seldom that the other has ended long before.
    for weight in (1, 1e-3):
        weighed = [
            {"source": part, "weight": w} for part, w in zip(parts, (1, weight), strict=True)
        ]
        with pytest.raises(NoExamplesError, match=r"none\.jsonl has no rows"):
            list(opened({"kind": "mix", "sources": weighed}).rows())


def test_a_large_source_is_read_at_several_places_at_once(tmp_path):
    """So that rows sorted by something do not stay together."""
    rows = [{"id": i} for i in range(8000)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=500
    )
    for part in range(8):
        (tmp_path / f"{part}.jsonl").write_bytes(lines(rows[part * 1000 : part * 1000 + 1000]))
    for kind in ("parquet", "jsonl"):
        settings = {"kind": kind, "path": str(tmp_path / f"*.{kind}")}
        source = opened(settings)
        found = [row.columns["id"] for row in source.rows()]
        assert sorted(found) == list(range(8000))
        firsts = found[:800]
        assert all(60 < sum(i // 1000 == part for i in firsts) < 140 for part in range(8))
        assert found == [row.columns["id"] for row in opened(settings).rows()]
        assert found != [row.columns["id"] for row in opened(settings, "other").rows()]
        middle = list(source.rows())[4321].after
        assert [row.columns["id"] for row in source.rows(middle)] == found[4322:]


# What is wrong with a row


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "must be an object with columns, is list"),
        (b'{"b": {"a": 1, "a": 2}}', "the key 'a' stands in an object twice"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b'{"a": "' + b"x" * (10 << 20) + b'"}', "longer than 4 MiB"),
    ],
)
def test_a_malformed_line_is_named_and_the_next_one_read(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n' + line + b'\n{"a": 2}')
    source = JsonLines([str(path)])
    good, bad, last = source.rows()
    assert good.columns == {"a": 1}
    assert bad.error is not None
    assert said in str(bad.error)
    assert str(bad.error).startswith(f"{path}, row 3: ")
    assert (last.number, last.columns) == (4, {"a": 2})
    assert list(source.rows(bad.after)) == [last]


def test_a_json_array_is_told_from_json_lines(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:2], indent=1))
    row = next(opened({"kind": "jsonl", "path": str(tmp_path / "rows.json")}).rows())
    assert "the file is a JSON array; write one object a line" in str(row.error)


def test_a_packed_file_is_known_by_its_end_in_capitals_too(tmp_path):
    (tmp_path / "ROWS.JSONL.GZ").write_bytes(gzip.compress(lines(ROWS[:2])))
    rows = opened({"kind": "jsonl", "path": str(tmp_path / "ROWS.JSONL.GZ")}).rows()
    assert [row.columns for row in rows] == ROWS[:2]


def test_a_byte_order_mark_may_stand_alone_on_the_first_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + lines(ROWS[:2]))
    rows = opened({"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}).rows()
    assert [row.columns for row in rows] == ROWS[:2]


def parquet_of(directory, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "rows.parquet")
    return list(opened({"kind": "parquet", "path": str(directory / "rows.parquet")}).rows())


@pytest.mark.parametrize("narrow", [pyarrow.float32(), pyarrow.float16()])
def test_narrow_floats_deep_in_parquet_are_read_as_they_were_written(tmp_path, narrow):
    kinds = [
        (pyarrow.list_(narrow), [0.1, None]),
        (pyarrow.large_list(narrow), [0.1]),
        (pyarrow.list_(narrow, 2), [0.1, 2.5]),
        (
            pyarrow.struct({"x": pyarrow.list_(narrow), "y": pyarrow.string()}),
            {"x": [0.1], "y": "z"},
        ),
        (pyarrow.map_(pyarrow.string(), narrow), {"x": 0.1, "y": None}),
    ]
    for kind, value in kinds:
        rows = parquet_of(tmp_path, a=pyarrow.array([value], kind))
        assert [row.columns["a"] for row in rows] == [value]


def test_maps_in_parquet_are_objects(tmp_path):
    kind = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (row,) = parquet_of(tmp_path, messages=pyarrow.array([[list(t.items()) for t in turns]], kind))
    assert row.columns == {"messages": turns}
    twice = pyarrow.array([[[("a", "1"), ("a", "2")]]], kind)
    (row,) = parquet_of(tmp_path, messages=twice)
    assert "row 1, field 'messages': cannot be read" in str(row.error)


@pytest.mark.parametrize(
    "far",
    [
        pyarrow.array([1, 2**31 - 1, 2], pyarrow.int32()).view(pyarrow.date32()),
        pyarrow.array([1, 2**45, 2]).view(pyarrow.timestamp("s")),
        pyarrow.array([1, 2**45, 2]).view(pyarrow.timestamp("s", "Europe/Berlin")),
    ],
)
def test_a_time_in_parquet_that_python_cannot_hold_names_row_and_column(tmp_path, far):
    rows = parquet_of(tmp_path, id=pyarrow.array([1, 2, 3]), at=far)
    assert [row.error is None for row in rows] == [True, False, True]
    assert "row 2, field 'at': cannot be read: " in str(rows[1].error)


def test_narrow_floats_in_parquet_are_read_as_they_were_written(tmp_path):
    narrow = {kind: pyarrow.array([0.1, None, 2.5]).cast(kind) for kind in ("float", "halffloat")}
    pyarrow.parquet.write_table(pyarrow.table(narrow), tmp_path / "rows.parquet")
    rows = list(opened({"kind": "parquet", "path": str(tmp_path / "rows.parquet")}).rows())
    assert [row.columns for row in rows] == [
        {"float": number, "halffloat": number} for number in (0.1, None, 2.5)
    ]


@pytest.mark.parametrize("end", ["-- all of them", ";\n;\n"])
def test_a_query_may_end_with_a_comment_or_semicolons(tmp_path, end):
    url = f"sqlite:///{database(tmp_path)}"
    query = f"select * from things {end}"
    rows = opened({"kind": "sql", "url": url, "query": query, "key": "id"}).rows()
    assert [row.columns for row in rows] == ROWS


def test_text_in_parquet_that_is_not_utf8_names_row_and_column(tmp_path):
    text = pyarrow.array([b"fine", b"\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"id": [1, 2, 3], "text": text})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = list(opened({"kind": "parquet", "path": str(tmp_path / "rows.parquet")}).rows())
    assert [row.error is None for row in rows] == [True, False, True]
    assert "row 2, field 'text': not UTF-8" in str(rows[1].error)


# What is wrong with a source


def refused(settings):
    with pytest.raises(SourceError) as caught:
        list(opened(settings).rows())
    return str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path):
    twins = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twins, tmp_path / "rows.parquet")
    said = refused({"kind": "parquet", "path": str(tmp_path / "rows.parquet")})
    assert said == f"{tmp_path}/rows.parquet has several columns named text"


@pytest.mark.parametrize("directory", ["plain", "old [v2]", "wh?t"])
def test_a_glob_finds_files_wherever_its_directory_is(tmp_path, directory):
    below = tmp_path / directory / "2026" / "rows"
    below.mkdir(parents=True)
    settings = jsonl_of(below, "a", ROWS)
    for pattern in ("2026/*/*.jsonl", "**", "*/**/a*"):
        settings["path"] = str(tmp_path / directory / pattern)
        assert [row.columns for row in opened(settings).rows()] == ROWS


def test_a_file_that_a_glob_finds_by_several_names_is_read_once(tmp_path):
    settings = jsonl_of(tmp_path, "a", ROWS)
    (tmp_path / "round").symlink_to(".")
    (tmp_path / "latest.jsonl").symlink_to("a.jsonl")
    settings["path"] = str(tmp_path / "**" / "*.jsonl")
    assert [row.columns for row in opened(settings).rows()] == ROWS
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    assert f"{tmp_path}/gone.jsonl cannot be read: No such file" in refused(settings)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_file_is_told(tmp_path, kind):
    missing = str(tmp_path / "none.data")
    assert refused({"kind": kind, "path": missing}) == (
        f"{missing} cannot be read: No such file or directory"
    )
    assert "matches no file" in refused({"kind": kind, "path": str(tmp_path / "*.none")})


@pytest.mark.parametrize(
    ("make", "file"), [(gzipped, "a.jsonl.gz"), (zstandardised, "a.jsonl.zst")]
)
def test_a_truncated_file_is_told(tmp_path, make, file):
    settings = make(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-9])
    assert "Truncated compressed stream" in refused(settings)


def test_a_damaged_parquet_file_is_told(tmp_path):
    settings = parquet(tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing here PAR1")
    assert "c.parquet cannot be read: " in refused(settings)


def test_a_python_function_that_fails_is_told(tmp_path):
    for code, said in [
        ("def rows():\n    yield {}\n    raise KeyError('x')\n", "failed after 1 rows: KeyError"),
        ("import nowhere\n", "cannot be imported: ModuleNotFoundError"),
        ("other = 1\n", "has no function 'rows'"),
    ]:
        file = tmp_path / "tasks.py"
        file.write_text(code)
        with pytest.raises(SourceError, match=said):
            list(PythonFunction(file, "rows").rows())
    file.write_text("def rows():\n    yield 7\n")
    (row,) = PythonFunction(file, "rows").rows()
    assert "row 1: must be an object" in str(row.error)


def test_a_missing_split_is_told(tmp_path):
    assert "has no split 'test'; it has train" in refused(
        {**saved_dataset(tmp_path), "split": "test"}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"key": "nr"}, "nr"),
        ({"table": "absent"}, "no such table: absent"),
        ({"url": "sqlite:////nowhere/rows.db"}, "/nowhere/rows.db does not exist"),
        (
            {"url": "sqlite:///${MANYLORA_NOT_SET}"},
            "MANYLORA_NOT_SET, of a database URL, is not set",
        ),
        ({"url": "duckdb:///rows.db"}, "not one SQLAlchemy can open"),
    ],
)
def test_a_database_that_cannot_be_read_is_told(tmp_path, changes, said):
    assert said in refused({**sql_table(tmp_path), **changes})


def test_a_key_that_would_lose_rows_is_refused(tmp_path):
    settings = {**sql_table(tmp_path), "page_rows": 1}
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        connection.execute("insert into things values (22, 'again')")
    assert "two rows have id 22; the key must be unique" in refused(settings)
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        connection.execute("update things set id = null where text = 'again'")
    assert "id is NULL in some rows" in refused(settings)


@pytest.mark.parametrize("page_rows", [1, 2, 3])
def test_keys_that_are_one_for_the_database_alone_are_refused(tmp_path, page_rows):
    """A page that ends between them would pass over the second."""
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        connection.execute("create table things (name text collate nocase)")
        names = ["a", "b", "B", "C", "c"][3 - page_rows :]
        connection.executemany("insert into things values (?)", [(name,) for name in names])
    url = f"sqlite:///{tmp_path}/rows.db"
    said = refused(
        {"kind": "sql", "url": url, "table": "things", "key": "name", "page_rows": page_rows}
    )
    assert re.search(r"takes name '(\w)' and '(?i:\1)' for equal; the key must be unique", said)


def test_rows_that_come_and_go_shift_nothing(tmp_path):
    source = opened(sql_table(tmp_path))
    rows = source.rows()
    seen = [next(rows) for _ in range(7)]
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        connection.execute("delete from things where id in (1, 2)")
    rest = list(source.rows(seen[-1].after))
    assert [row.columns["id"] for row in seen + rest] == list(range(23))


# Secrets


RECIPE = {
    "base": "base",
    "run_directory": "run",
    "tasks": [
        {
            "name": "a",
            "source": {"kind": "sql", "table": "t", "key": "id"},
            "format": {"kind": "prompt_completion"},
            "steps": 1,
        }
    ],
}


def recipe_with(tmp_path, **source):
    recipe = json.loads(json.dumps(RECIPE))
    recipe["tasks"][0]["source"].update(source)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://reader:hunter2@db/shop",
        "mysql://db/shop?user=x&password=hunter2",
    ],
)
def test_a_password_in_a_recipe_is_refused_without_repeating_it(tmp_path, url):
    with pytest.raises(ConfigError, match="a password does not belong in a recipe") as caught:
        recipe_with(tmp_path, url=url)
    assert "hunter2" not in str(caught.value)


def test_credentials_of_a_bucket_in_a_recipe_are_refused(tmp_path):
    recipe = {**RECIPE["tasks"][0], "source": {"kind": "jsonl", "path": "s3://key:hunter2@b/rows"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "tasks": [recipe]}))
    with pytest.raises(ConfigError, match="credentials do not belong in a recipe") as caught:
        load_recipe(path)
    assert "hunter2" not in str(caught.value)


def test_the_environment_fills_a_url_only_when_it_is_opened(tmp_path, monkeypatch):
    file = database(tmp_path)
    monkeypatch.setenv("ROWS_FILE", str(file))
    monkeypatch.setenv("ROWS_URL", f"sqlite:///{file}")
    for source in ({"url": "sqlite:///${ROWS_FILE}"}, {"url_env": "ROWS_URL"}):
        recipe = recipe_with(tmp_path, table="things", **source)
        assert str(file) not in recipe.model_dump_json()
        assert len(list(open_source(recipe.tasks[0].source).rows())) == 23
    recipe = recipe_with(tmp_path, url="postgresql+psycopg://${USER}:${SECRET}@db:${PORT}/shop")
    assert "${SECRET}" in recipe.model_dump_json()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///rows.db",
        "sqlite:///file:rows.db?mode=ro&uri=true",
        "sqlite:///file:{}/rows.db?uri=true",
    ],
)
def test_a_database_file_is_found_from_the_recipe(tmp_path, url):
    database(tmp_path)
    recipe = recipe_with(tmp_path, url=url.format(tmp_path), table="things")
    assert len(list(open_source(recipe.tasks[0].source).rows())) == 23


@pytest.mark.parametrize("source", [{"table": ""}, {"table": None, "query": ""}])
def test_an_empty_table_or_query_is_a_mistake_of_the_recipe(tmp_path, source):
    with pytest.raises(ConfigError, match="at least 1 character"):
        recipe_with(tmp_path, url="sqlite:///rows.db", **source)
