"""What every store of blobs promises, and what one over a network does when that misbehaves."""

import hashlib
import os
import shutil
import threading
import tracemalloc
from datetime import timedelta

import boto3
import pytest

from manylora_registry.blobs import copy_verified, read_verified
from manylora_registry.errors import BlobStoreError, CorruptBlobError, RegistryLocationError
from manylora_registry.stores import open_blob_store
from tests.integration.registry.s3_server import BUCKET, CREDENTIALS, FaultyProxy, s3_server

CONTENT = os.urandom(300_000)
ENDLESS = ("silence", "drip")
"""Faults that last until the client gives up."""


def digest_of(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as url:
        yield url


@pytest.fixture
def credentials(monkeypatch):
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(params=["local", "s3", "s3 without a prefix"])
def store(request, tmp_path, monkeypatch):
    if request.param == "local":
        return open_blob_store((tmp_path / "a store").as_uri())
    request.getfixturevalue("credentials")
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("endpoint"))
    prefix = f"/{tmp_path.name}/x" if request.param == "s3" else ""
    opened = open_blob_store(f"s3://{BUCKET}{prefix}")
    for digest in [*opened.digests()]:
        opened.delete(digest)
    return opened


def put(store, content):
    digest = digest_of(content)
    with store.staging() as staging:
        file = staging.directory / "blob"
        file.write_bytes(content)
        staging.put({digest: file})
        assert not file.exists()
    return digest


class TestEveryStore:
    def test_gives_back_what_was_put(self, store, tmp_path):
        digests = {put(store, content) for content in (b"", b"x", CONTENT)}

        assert set(store.digests()) == digests
        assert store.size(digest_of(CONTENT)) == len(CONTENT)
        assert read_verified(store, digest_of(CONTENT), len(CONTENT)) == CONTENT
        copy_verified(store, digest_of(CONTENT), len(CONTENT), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == CONTENT
        with store.open(digest_of(CONTENT)) as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == digest_of(CONTENT)[7:]
            assert file.tell() == len(CONTENT)

    def test_leaves_alone_what_others_put_beside_its_blobs(self, store, tmp_path):
        digest = put(store, os.urandom(100))
        name = f"blobs/sha256/{digest[7:9]}/{digest[7:]}.part"
        if (tmp_path / "a store").is_dir():
            (tmp_path / "a store" / name).write_bytes(b"theirs")
        else:
            client = boto3.client("s3")
            keys = [each["Key"] for each in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
            (key,) = (key for key in keys if key.endswith(digest[7:]))
            client.put_object(Bucket=BUCKET, Key=f"{key}.part", Body=b"theirs")

        assert [*store.digests()] == [digest]

    def test_takes_the_same_blob_twice(self, store):
        assert put(store, CONTENT) == put(store, CONTENT)
        assert [*store.digests()] == [digest_of(CONTENT)]

    def test_takes_the_same_blob_from_many_at_once(self, store):
        together = threading.Barrier(8)

        def publish():
            together.wait()
            put(store, CONTENT)

        threads = [threading.Thread(target=publish) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert [*store.digests()] == [digest_of(CONTENT)]
        assert read_verified(store, digest_of(CONTENT), len(CONTENT)) == CONTENT

    def test_says_what_is_missing(self, store, tmp_path):
        put(store, CONTENT)  # One without any might as well not be mounted.
        missing = digest_of(b"never put")

        for read in (
            lambda: store.open(missing),
            lambda: read_verified(store, missing, 10),
            lambda: copy_verified(store, missing, 9, tmp_path / "copy"),
        ):
            with pytest.raises(CorruptBlobError, match="is missing") as failed:
                read()
            assert failed.value.digest == missing
        assert not (tmp_path / "copy").exists()
        assert store.size(missing) == 0
        store.set_aside(missing)

    def test_hands_out_no_more_than_was_asked_for(self, store, tmp_path):
        digest = put(store, CONTENT)

        with pytest.raises(CorruptBlobError, match="does not match"):
            read_verified(store, digest, len(CONTENT) - 1)
        with pytest.raises(CorruptBlobError, match="does not match"):
            copy_verified(store, digest, len(CONTENT) - 1, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()

    def test_hands_out_no_blob_by_another_name(self, store, tmp_path):
        with store.staging() as staging:
            blob = staging.directory / "blob"
            blob.write_bytes(CONTENT)
            wrong = digest_of(b"another")
            try:
                staging.put({wrong: blob})
            except BlobStoreError:
                assert [*store.digests()] == []  # S3 checks while it receives.
                return

        with pytest.raises(CorruptBlobError, match="does not match"):
            copy_verified(store, wrong, len(CONTENT), tmp_path / "copy")

    def test_forgets_what_was_deleted(self, store):
        digest = put(store, CONTENT)

        store.delete(digest)
        store.delete(digest)

        assert [*store.digests()] == []
        put(store, CONTENT)
        assert read_verified(store, digest, len(CONTENT)) == CONTENT

    def test_takes_a_blob_again_that_was_set_aside(self, store):
        digest = put(store, CONTENT)

        store.set_aside(digest)

        assert [*store.digests()] == []
        put(store, CONTENT)
        store.set_aside(digest)
        put(store, CONTENT)
        assert read_verified(store, digest, len(CONTENT)) == CONTENT

    def test_leaves_living_publishers_alone(self, store):
        with store.staging() as staging:
            blob = staging.directory / "blob"
            blob.write_bytes(CONTENT)
            assert store.sweep(timedelta()) == 0
            staging.put({digest_of(CONTENT): blob})
        assert [*store.digests()] == [digest_of(CONTENT)]

    def test_moves_large_blobs_in_little_memory(self, store, tmp_path):
        large = tmp_path / "large"
        sha256 = hashlib.sha256()
        with large.open("wb") as file:
            for number in range(72):
                # No two alike: what is hashed must not be overwritten by what is read meanwhile.
                block = bytes([number]) * (1 << 20)
                file.write(block)
                sha256.update(block)
        digest = f"sha256:{sha256.hexdigest()}"
        size = large.stat().st_size

        tracemalloc.start()
        with store.staging() as staging:
            shutil.move(large, staging.directory)
            staging.put({digest: staging.directory / "large"})
        copy_verified(store, digest, size, tmp_path / "copy")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

        assert (tmp_path / "copy").stat().st_size == size
        assert peak < 16 << 20


def test_a_local_store_clears_up_after_the_dead(tmp_path):
    store = open_blob_store(tmp_path.as_uri())
    child = os.fork()
    if child == 0:
        staging = store.staging()
        (staging.__enter__().directory / "blob").write_bytes(CONTENT)
        os._exit(9)
    os.waitpid(child, 0)

    assert store.sweep(timedelta(hours=1)) == 0
    assert store.sweep(timedelta()) == 1
    assert [*(tmp_path / "incoming").iterdir()] == []


def test_a_local_blob_is_not_overwritten_by_mistake(tmp_path):
    digest = put(open_blob_store(tmp_path.as_uri()), CONTENT)

    (blob,) = (tmp_path / "blobs").rglob(digest[7:])
    assert blob.stat().st_mode & 0o222 == 0


def test_a_damaged_local_blob_is_kept_to_be_looked_at(tmp_path):
    store = open_blob_store(tmp_path.as_uri())
    digest = put(store, CONTENT)

    store.set_aside(digest)

    assert (tmp_path / "damaged" / digest[7:]).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url",
    ["", "/tmp/x", "file://host/x", "file:relative", "s3://", "s3:///x", "s3://b/p?x=1", "ftp://x"],
)
def test_what_names_no_store_is_refused(url):
    with pytest.raises(RegistryLocationError, match="file:///DIRECTORY or s3://BUCKET/PREFIX"):
        open_blob_store(url)


class TestFaults:
    """S3 behind a network that spoils answers: the right bytes, or one stated error."""

    @pytest.fixture
    def proxy(self, endpoint):
        with FaultyProxy(endpoint) as running:
            yield running

    @pytest.fixture
    def opened(self, proxy, credentials, monkeypatch, tmp_path):
        """Opens the store; a good answer may take so long as `read_seconds`."""
        from manylora_registry.s3_store import S3BlobStore

        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

        def open_store(read_seconds=60.0):
            return S3BlobStore(
                BUCKET, tmp_path.name, connect_seconds=60, read_seconds=read_seconds, attempts=2
            )

        return open_store

    @pytest.fixture
    def store(self, opened):
        return opened()

    @pytest.fixture
    def surviving(self, opened, fault):
        """Waits no longer than it must for an answer that is good, even on a busy machine."""
        return opened(5.0 if fault in ENDLESS else 60.0)

    @pytest.fixture
    def failing(self, opened, fault):
        """Gets no good answer it might miss."""
        return opened(0.3 if fault in ENDLESS else 60.0)

    @pytest.mark.parametrize("fault", ["500", "503", "silence", "reset", "cut", "drip", "flip"])
    def test_one_bad_answer_to_a_read_is_survived(self, store, surviving, proxy, tmp_path, fault):
        digest = put(store, CONTENT)
        proxy.spoil("GET", fault)

        copy_verified(surviving, digest, len(CONTENT), tmp_path / "copy")

        assert (tmp_path / "copy").read_bytes() == CONTENT
        assert proxy.requests == 2

    @pytest.mark.parametrize("fault", ["500", "503", "silence", "reset", "cut", "drip", "403"])
    def test_bad_answers_to_every_read_are_one_error(self, store, failing, proxy, tmp_path, fault):
        digest = put(store, CONTENT)
        proxy.spoil("GET", *[fault] * 20)

        with pytest.raises(BlobStoreError):
            copy_verified(failing, digest, len(CONTENT), tmp_path / "copy")

        assert not (tmp_path / "copy").exists()
        assert proxy.requests <= 4

    def test_wrong_bytes_every_time_are_a_damaged_blob(self, store, proxy, tmp_path):
        digest = put(store, CONTENT)
        proxy.spoil("GET", *["flip"] * 20)

        with pytest.raises(CorruptBlobError):
            copy_verified(store, digest, len(CONTENT), tmp_path / "copy")
        with pytest.raises(CorruptBlobError):
            read_verified(store, digest, len(CONTENT))

        assert not (tmp_path / "copy").exists()

    @pytest.mark.parametrize("fault", ["500", "503", "silence", "reset"])
    def test_one_bad_answer_to_a_write_is_survived(self, store, surviving, proxy, fault):
        proxy.spoil("PUT", fault)

        digest = put(surviving, CONTENT)

        assert proxy.requests == 2
        assert read_verified(store, digest, len(CONTENT)) == CONTENT

    @pytest.mark.parametrize("fault", ["500", "silence", "reset", "403"])
    def test_bad_answers_to_every_write_leave_nothing(self, store, failing, proxy, fault):
        proxy.spoil("PUT", *[fault] * 20)

        with pytest.raises(BlobStoreError):
            put(failing, CONTENT)

        assert [*store.digests()] == []

    @pytest.mark.parametrize("method", ["HEAD", "GET"])
    def test_a_server_that_is_gone_is_one_error(self, store, proxy, method, tmp_path):
        digest = put(store, CONTENT)
        proxy.spoil(method, *["reset"] * 20)

        with pytest.raises(BlobStoreError, match="try again later"):
            put(store, CONTENT) if method == "HEAD" else store.open(digest)

    def test_other_bytes_in_the_place_of_a_blob_are_healed_by_the_next_put(
        self, store, endpoint, tmp_path
    ):
        digest = put(store, CONTENT)
        name = digest[7:]
        boto3.client("s3", endpoint_url=endpoint).put_object(
            Bucket=BUCKET,
            Key=f"{tmp_path.name}/blobs/sha256/{name[:2]}/{name}",
            Body=b"something else",
        )
        with pytest.raises(CorruptBlobError):
            read_verified(store, digest, len(CONTENT))

        put(store, CONTENT)

        assert read_verified(store, digest, len(CONTENT)) == CONTENT
