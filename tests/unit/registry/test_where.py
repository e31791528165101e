"""The filter language: what it means, and where it is wrong."""

import hashlib

import pytest

from manylora_registry.errors import QueryError


@pytest.fixture
def found(registry, base, make_adapter):
    """Finds versions among five, and says which."""
    for seed, (name, tags, metrics) in enumerate(
        [
            ("a", {"lang": "en", "note": "50% off"}, {"f1": 0.9}),
            ("a", {"lang": "de"}, {"f1": 0.8}),
            ("a", {"lang": "en-GB"}, {"f1": -1e-9, "loss": 2}),
            ("b", {"lang": "[x]", "my.key/1": "it's"}, {}),
            ("b", {}, {"f1": 0.85}),
        ]
    ):
        parent = "a@1" if name == "b" else None
        lineage = {"run": f"r{seed}"}
        registry.publish(
            name,
            make_adapter(seed),
            base=base,
            tags=tags,
            metrics=metrics,
            lineage=lineage,
            parent=parent,
        )
    registry.set_alias("a", "production", 2)
    registry.yank("a@3")

    def ran(where, **options):
        page = registry.find_versions(where, **options)
        return [f"{version.name}{version.number}" for version in page.versions]

    return ran


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("", "a1 a2 a3 b1 b2"),
        ("tag.lang=en", "a1"),
        ("tag.lang = 'en' and metric.f1 > 0.8", "a1"),
        ("tag.lang!=en", "a2 a3 b1"),
        ("not tag.lang=en", "a2 a3 b1 b2"),
        ("tag.lang~en*", "a1 a3"),
        ("tag.lang~e?", "a1"),
        ("tag.lang~'[x]'", "b1"),
        ("tag.lang~*", "a1 a2 a3 b1"),
        ('tag.note="50% off"', "a1"),
        ("tag.note~'50% *'", "a1"),
        ("tag.note~'50_ *'", ""),
        ('tag.my.key/1="it\'s"', "b1"),
        ("tag.lang<en", "a2 b1"),
        ("metric.f1>=0.85", "a1 b2"),
        ("metric.f1<0", "a3"),
        ("metric.f1<-1e-10", "a3"),
        ("metric.loss=2", "a3"),
        ("lineage.run=r3", "b1"),
        ("name=b", "b1 b2"),
        ("name~?", "a1 a2 a3 b1 b2"),
        ("number<=1 or metric.loss>1", "a1 a3 b1"),
        ("name=a and (number=1 or number=3)", "a1 a3"),
        ("name=a and number=1 or number=2", "a1 a2 b2"),
        ("not not name=b", "b1 b2"),
        ("rank=2 and size>0", "a1 a2 a3 b1 b2"),
        ("yanked=true", "a3"),
        ("yanked=false and name=a", "a1 a2"),
        ("alias=production", "a2"),
        ("alias~prod*", "a2"),
        ("parent=a@1", "b1 b2"),
        ("digest~sha256:*", "a1 a2 a3 b1 b2"),
        ("file~sha256:*", "a1 a2 a3 b1 b2"),
        ("created>2020-01-01", "a1 a2 a3 b1 b2"),
        ("created<2020-01-01T12:00:00+02:00", ""),
    ],
)
def test_a_filter_means(found, where, expected):
    assert found(where) == expected.split()


@pytest.mark.parametrize(
    ("where", "position", "said"),
    [
        ("tag.lang", 9, "operator|one of"),
        ("tag.lang=", 10, "value"),
        ("tag.lang==en", 10, "value"),
        ("colour=red", 1, "no field"),
        ("name=a and colour=red", 12, "no field"),
        ("tag.=x", 1, "no field"),
        ("metric.f1>high", 11, "number"),
        ("metric.f1>nan", 11, "number"),
        ("metric.f1~0.8", 11, "pattern"),
        ("created>tomorrow", 9, "date"),
        ("yanked=maybe", 8, "yanked=true"),
        ("parent=a", 8, "NAME@NUMBER"),
        ("parent=a@9999999999999999999999", 8, "NAME@NUMBER"),
        ("name=a name=b", 8, "'and'"),
        ("name=a and", 11, "field"),
        ("(name=a", 8, r"'\)'"),
        ("name=a)", 7, "'and'"),
        ("name='a", 6, "quote"),
        ("name=a and !b", 12, "not expected"),
        ("(" * 50 + "name=a" + ")" * 50, 33, "deeper"),
    ],
)
def test_a_wrong_filter_points_at_the_place(found, where, position, said):
    with pytest.raises(QueryError, match=said) as refused:
        found(where)
    assert f"at character {position}," in str(refused.value)
    assert "\n" not in str(refused.value)


def test_versions_are_sorted_both_ways(found):
    assert found("", sort="metric.f1") == ["a3", "a2", "b2", "a1"]
    assert found("", sort="-metric.f1") == ["a1", "b2", "a2", "a3"]
    assert found("", sort="tag.lang") == ["b1", "a2", "a1", "a3"]
    assert found("", sort="created") == ["a1", "a2", "a3", "b1", "b2"]
    assert found("", sort="-name") == ["b2", "b1", "a3", "a2", "a1"]


@pytest.mark.parametrize("sort", ["name", "-created", "metric.f1", "-metric.f1", "tag.lang"])
def test_pages_go_on_where_the_last_ended(found, registry, sort):
    whole = found("", sort=sort)
    seen, after = [], None
    while True:
        page = registry.find_versions(sort=sort, limit=2, after=after)
        seen += [f"{version.name}{version.number}" for version in page.versions]
        if page.next is None:
            break
        after = page.next

    assert seen == whole


def test_wrong_orders_limits_and_keys_are_refused(found, registry):
    key = registry.find_versions(limit=1).next
    for options in (
        {"sort": "colour"},
        {"sort": "metric."},
        {"limit": 0},
        {"limit": 1001},
        {"after": "nonsense"},
        {"after": key[:-2]},
        {"after": key, "sort": "created"},
        {"where": "name=" + "a" * 5000},
    ):
        with pytest.raises(QueryError):
            registry.find_versions(**options)


def test_deleted_versions_are_left_out(found, registry):
    registry.delete("b@2")
    assert found("name=b") == ["b1"]


def test_versions_are_found_by_a_file_of_theirs(found, make_adapter):
    weights = (make_adapter(2) / "adapter_model.safetensors").read_bytes()
    assert found(f"file=sha256:{hashlib.sha256(weights).hexdigest()}") == ["a3"]
