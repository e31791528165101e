"""Values that Python has no form for are malformed rows; the rows around them are read."""

import sqlite3

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter

import manylora_trainer
from manylora_trainer.errors import SourceError
from manylora_trainer.source_factory import open_source
from manylora_trainer.source_settings import SourceSettings
from tests.unit.trainer.conftest import words, write_rows

SETTINGS = TypeAdapter(SourceSettings)


def rows(**settings):
    return list(open_source(SETTINGS.validate_python(settings)).rows())


@pytest.fixture
def database(tmp_path):
    """Rows 1 to 9 with the text of the fifth in Latin-1."""
    file = tmp_path / "rows.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
        for number in range(1, 10):
            text = "CAST(x'e941' AS TEXT)" if number == 5 else f"'row {number}'"
            connection.execute(f"INSERT INTO rows VALUES ({number * 10}, {text})")
    connection.close()
    return file


@pytest.mark.parametrize("page_rows", [2, 4, 100])
def test_text_of_a_database_that_is_not_utf8_is_one_malformed_row(database, page_rows):
    settings = {"kind": "sql", "url": f"sqlite:///{database}", "table": "rows", "key": "id"}
    found = rows(**settings, page_rows=page_rows)
    assert [row.columns.get("id") for row in found] == [10, 20, 30, 40, None, 60, 70, 80, 90]
    bad = found[4]
    assert str(bad.error).startswith("table rows, row 5: id 50 cannot be read: Could not decode")
    source = open_source(SETTINGS.validate_python({**settings, "page_rows": page_rows}))
    for index in (3, 4):
        assert len(list(source.rows(found[index].after))) == 8 - index


def test_a_relative_database_of_the_environment_is_refused(database, monkeypatch):
    monkeypatch.chdir(database.parent)
    monkeypatch.setenv("ROWS", "rows.db")
    for url in ("sqlite:///rows.db", "sqlite:///file:rows.db?mode=ro&uri=true"):
        monkeypatch.setenv("ROWS_URL", url)
        with pytest.raises(SourceError, match=r"rows\.db is relative, .* give the whole path"):
            rows(kind="sql", url_env="ROWS_URL", table="rows", key="id")
    with pytest.raises(SourceError, match=r"rows\.db is relative"):
        rows(kind="sql", url="sqlite:///${ROWS}", table="rows", key="id")
    monkeypatch.setenv("ROWS_URL", f"sqlite:///{database}")
    assert len(rows(kind="sql", url_env="ROWS_URL", table="rows", key="id")) == 9


def test_a_time_finer_than_a_microsecond_is_a_malformed_row_of_parquet(tmp_path):
    times = pyarrow.time64("ns")
    table = pyarrow.table(
        {
            "id": [1, 2, 3, 4],
            "at": pyarrow.array([1_000, 1_234_567, None, 2_000], times),
            "all": pyarrow.array([[1_000], [], None, [3_000, 7]], pyarrow.list_(times)),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = rows(kind="parquet", path=str(tmp_path / "rows.parquet"))
    assert [row.error and row.error.field for row in found] == [None, "at", None, "all"]
    assert str(found[0].columns["at"]) == "00:00:00.000001"
    assert "would lose data: 1234567" in str(found[1].error)


def test_a_malformed_row_of_a_mix_counts_once_however_often_it_comes(
    make_task, write_recipe, tmp_path
):
    few = [{"wrong": "a", "right": "b"}, {"wrong": "no answer"}]
    # The second comes when the first has come again and again.
    many = [*words(12), {"wrong": "no answer either"}, *words(60)]
    parts = [write_rows(tmp_path / "few.jsonl", few), write_rows(tmp_path / "all.jsonl", many)]
    source = {
        "kind": "mix",
        "sources": [{"source": {"kind": "jsonl", "path": str(path)}} for path in parts],
    }
    task = make_task("mixed", source=source, on_bad_row="skip", max_bad_rows=2, shuffle_buffer=40)
    result = manylora_trainer.train(write_recipe(task), tmp_path / "run")
    assert result.tasks["mixed"].rows_skipped == 2


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_a_dataset_gives_plain_values_whatever_it_was_formatted_for(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    plain = [{"text": f"row {i}", "n": i, "share": i / 10} for i in range(4)]
    datasets.Dataset.from_list(plain).with_format(form).save_to_disk(tmp_path / "saved")
    assert [r.columns for r in rows(kind="datasets", path=str(tmp_path / "saved"))] == plain


@pytest.mark.parametrize("builder", [None, "parquet"])
def test_narrow_floats_of_a_dataset_are_the_numbers_they_were_written_from(tmp_path, builder):
    datasets = pytest.importorskip("datasets")
    narrow = datasets.Value("float32")
    features = datasets.Features({"price": narrow, "all": datasets.List(narrow)})
    saved = datasets.Dataset.from_dict({"price": [0.1, 0.7], "all": [[0.3], []]}, features)
    if builder is None:
        saved.save_to_disk(tmp_path / "saved")
    else:
        saved.to_parquet(tmp_path / "saved")
    found = [
        r.columns for r in rows(kind="datasets", path=str(tmp_path / "saved"), builder=builder)
    ]
    assert found == [{"price": 0.1, "all": [0.3]}, {"price": 0.7, "all": []}]


def test_what_the_datasets_library_cannot_read_is_said_in_our_words(tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"a": 1}]).select([]).save_to_disk(tmp_path / "empty")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "bad.json").write_text("{nope\n")
    for settings, match in (
        ({"path": "empty"}, "has no rows"),
        ({"path": "empty.json", "builder": "json"}, "has no rows"),
        ({"path": "*.nothing", "builder": "json"}, "has no rows"),
        ({"path": "bad.json", "builder": "json"}, r"bad\.json cannot be read: JSON parse error"),
        ({"path": "bad.json", "builder": "squad"}, "no builder 'squad'; it has arrow, .*csv"),
        ({"path": "bad.json", "builder": "pandas"}, "reads pickles"),
    ):
        capfd.readouterr()
        with pytest.raises(SourceError, match=match):
            rows(kind="datasets", **{**settings, "path": str(tmp_path / settings["path"])})
        assert capfd.readouterr().err == ""
