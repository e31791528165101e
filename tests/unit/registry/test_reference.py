import pytest

from manylora_registry import AdapterReference
from manylora_registry.errors import InvalidNameError, InvalidReferenceError
from manylora_registry.reference import check_adapter_name, check_alias_name

HEX = "0123456789ab"


@pytest.mark.parametrize(
    ("text", "name", "selector"),
    [
        ("spelling", "spelling", "production"),
        ("spelling@3", "spelling", "3"),
        ("user-agent_v1.2@staging", "user-agent_v1.2", "staging"),
        (f"a@sha256:{HEX}", "a", f"sha256:{HEX}"),
        ("9" * 64, "9" * 64, "production"),
    ],
)
def test_a_reference_is_a_name_and_a_selector(text, name, selector):
    reference = AdapterReference.parse(text)

    assert (reference.name, reference.selector) == (name, selector)
    assert AdapterReference.parse(str(reference)) == reference


def test_exactly_one_way_of_selecting_is_meant():
    def ways(text):
        reference = AdapterReference.parse(text)
        return reference.number, reference.digest, reference.alias

    assert ways("a@7") == (7, None, None)
    assert ways(f"a@sha256:{HEX}") == (None, f"sha256:{HEX}", None)
    assert ways("a") == (None, None, "production")


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "@1", "a@", "a@b@c", "A", "a b", "a\n", "a@b\n", "é", "../a", "..", ".a", "a/b",
        "/etc/passwd", "a@../b", "a@/b", "a\0", "x" * 65, "a@" + "x" * 65, "a@0", "a@01", "a@-1",
        "a@sha256", "a@sha256:", "a@sha256:0123", f"a@sha256:{HEX.upper()}",
        f"a@sha256:{'0' * 65}", "a@" + "9" * 19, "a@\uff11",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(InvalidReferenceError):
        AdapterReference.parse(text)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "A", "a@b", "a\n", "-a", "x" * 65])
def test_names_that_could_be_paths_or_references_are_refused(name):
    with pytest.raises(InvalidNameError):
        check_adapter_name(name)
    with pytest.raises(InvalidNameError):
        check_alias_name(name)


@pytest.mark.parametrize("alias", ["1", "007", "sha256"])
def test_an_alias_cannot_be_taken_for_another_selector(alias):
    check_adapter_name(alias)
    with pytest.raises(InvalidNameError):
        check_alias_name(alias)
