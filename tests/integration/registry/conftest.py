"""A tiny base, adapters for it, and empty registries of every kind.

One Postgres is started for the whole run; each test has a database of its own in it.
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import save_file

from manylora_registry import BaseModelIdentity, Registry
from tests.integration.postgres import start_postgres
from tests.integration.registry.s3_server import BUCKET, CREDENTIALS, s3_server

BASE = BaseModelIdentity(
    fingerprint="sha256:" + "b" * 64,
    tensors={
        "model.embed_tokens.weight": (32, 8),
        "model.norm.weight": (8,),
        "model.layers.0.q_proj.weight": (8, 8),
        "model.layers.0.up_proj.weight": (16, 8),
    },
)
AdapterMaker = Callable[[int], Path]
DATABASES = ("sqlite", "postgres")
HERE = Path(__file__).parent
BLOBS = ("local", "s3")


@dataclass(frozen=True)
class Place:
    """Where a registry is, as any process can be told."""

    database: str
    blobs: str

    def open(self) -> Registry:
        return Registry.open(database=self.database, blobs=self.blobs)


@pytest.fixture(scope="session")
def postgres() -> Iterator[sa.Engine]:
    """A running server, as its superuser."""
    server = start_postgres("manylora-postgres-")
    url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        # No test cuts its power.
        connection.exec_driver_sql("ALTER SYSTEM SET fsync = off")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    yield engine
    engine.dispose()
    # At once: nobody wants its data in order.
    process = server.get_postmaster_info().process
    assert process is not None
    process.send_signal(signal.SIGQUIT)
    process.wait(60)
    server.cleanup()


_numbers = itertools.count()


@pytest.fixture
def new_postgres(postgres):
    """Makes an empty database, or a copy of another, and returns its URL."""

    def make(template: str = "template1") -> str:
        name = f"registry_{next(_numbers)}"
        source = sa.make_url(template).database if "://" in template else template
        with postgres.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE {name} TEMPLATE "{source}"')
        return postgres.url.set(database=name).render_as_string(hide_password=False)

    return make


@pytest.fixture(params=DATABASES)
def database(request, tmp_path) -> str:
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite'}"
    return request.getfixturevalue("new_postgres")()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """URL of a running S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint, monkeypatch) -> str:
    """A bucket that this process and those it starts find."""
    for key, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(key, value)
    return BUCKET


@pytest.fixture(params=BLOBS)
def place(request, database, tmp_path) -> Place:
    """An empty registry of each kind."""
    if request.param == "local":
        return Place(database, (tmp_path / "blobs").as_uri())
    bucket = request.getfixturevalue("bucket")
    return Place(database, f"s3://{bucket}/{next(_numbers)}")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a place: the tests cut no power, and sync all the time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture
def base() -> BaseModelIdentity:
    return BASE


@pytest.fixture
def make_adapter(tmp_path: Path) -> AdapterMaker:
    """Writes an adapter directory of rank 2 for the tiny base; `seed` decides its weights."""

    def make(seed: int) -> Path:
        return write_adapter(tmp_path / f"adapter-{seed}", seed)

    return make


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    """The tiny base as other processes read it."""
    file = tmp_path / "base.json"
    file.write_text(json.dumps(dataclasses.asdict(BASE)))
    return file


def write_adapter(directory: Path, seed: int) -> Path:
    directory.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE.fingerprint,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(plain_tensors(seed), directory / "adapter_model.safetensors")
    return directory


def plain_tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0"
    return {
        f"{prefix}.{module}.{side}.weight": rng.normal(size=shape).astype(np.float32)
        for module, out in (("q_proj", 8), ("up_proj", 16))
        for side, shape in (("lora_A", (2, 8)), ("lora_B", (out, 2)))
    }


@pytest.fixture
def registry(place) -> Iterator[Registry]:
    """An open registry of each kind."""
    with place.open() as opened:
        yield opened


@pytest.fixture
def publish(registry, make_adapter):
    """Publishes an adapter with the weights of `seed`; the same seed is the same adapter."""
    made: dict[int, Path] = {}

    def published(seed=0, name="spelling", **description):
        if seed not in made:
            made[seed] = make_adapter(seed)
        return registry.publish(name, made[seed], base=BASE, **description)

    return published


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """crash.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the crash shim")
    library = tmp_path_factory.mktemp("shim") / "crash.so"
    subprocess.run(
        [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", library, HERE / "crash.c", "-ldl"],
        check=True,
    )
    return library


@pytest.fixture
def crash(shim, tmp_path, base_file):
    """Kills an action at each of its calls; the directories left behind, each call in order."""

    def at_every_call(action, adapter, writes):
        done = subprocess.run(
            [sys.executable, HERE / "crash_every_call.py", tmp_path, action, adapter, writes],
            env={**os.environ, "LD_PRELOAD": str(shim)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        count = int(done.stdout)
        return [tmp_path / str(number) for number in range(count)]

    return at_every_call


@pytest.fixture
def prepared(tmp_path, base, make_adapter):
    """A registry with one version, to be copied for each crash; the directory of that version."""
    adapter = make_adapter(1)
    with Registry.open(tmp_path / "prepared" / "registry") as registry:
        registry.publish("spelling", adapter, base=base)
    return adapter


@pytest.fixture
def garbage(tmp_path, prepared, make_adapter):
    """The prepared registry with something to collect: a deleted version beside one in use."""
    with Registry.open(tmp_path / "prepared" / "registry") as registry:
        registry.publish("spelling", make_adapter(2), base=BASE)
        registry.set_alias("spelling", "production", 2)
        registry.yank("spelling@1")
        registry.delete("spelling@1")
    return prepared
