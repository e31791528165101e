"""Versions on their way from staging to production: two real gateways over one registry.

Production is the gateway all tests share; staging is one that `deploy/up` starts. The versions
are trained here, to say what they do: two are good, one answers wrongly, and one answers rightly
but does not stop talking, which no suite of short answers sees.
"""

import itertools
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from manylora.admin.v1 import admin_pb2
from manylora.admin.v1.admin_pb2_grpc import AdminServiceStub
from manylora_client import ClientError
from manylora_registry import Registry
from manylora_registry.base import BaseModelIdentity
from tests.e2e.harness import ROOT, Gateway, wait_until
from tests.e2e.test_training import manylora
from tests.integration.deploy.stage_files import write_stage

NAME = "tint"
ANSWERS = {"good": "violet", "better": "violet", "wrong": "amber", "endless": "violet " * 20}
"""What each version is trained to say, in the order of their numbers."""

TASK = """
  - name: {name}
    source: {{kind: jsonl, path: {name}.jsonl}}
    format: {{kind: prompt_completion, system: Name the colour.}}
    split: {{validation: 0.1, held_out: 0.1}}
    lora: {{rank: {rank}, alpha: 16, target_modules: all-linear}}
    optimizer: {{learning_rate: 5.0e-3}}
    steps: 8
    batch_size: 4
"""
SUITE = {
    "name": "colours",
    "tasks": [
        {
            "name": "colour",
            "adapter": NAME,
            "rows": "rows.jsonl",
            "max_tokens": 6,
            "scorers": [{"kind": "regex", "pattern": "^violet"}],
            "thresholds": [{"score": "regex", "at_least": 0.9}],
        }
    ],
}
GATES = {
    "suites": [{"path": "suite.yaml"}],
    "decision": {"difference": 0.9, "rows": 8},
    "max_tokens": 24,
    "smoke": {"requests": 6, "concurrency": 2, "timeout_s": 120, "answer_p95_s": 100},
    "canary": {
        "steps": [20, 50, 100],
        "window_s": 2,
        "look_s": 0.5,
        "requests": 5,
        "bounds": {"errors": 0.0, "first_token_p95_s": 60, "tokens_ratio": 2},
    },
}
PACE_S = 0.2
"""Between an answer and the next request; two engines and the scripts share the machine."""


@pytest.fixture(scope="module")
def stages(
    tmp_path_factory: pytest.TempPathFactory,
    base: Path,
    identity: BaseModelIdentity,
    registry: Registry,
    registry_directory: Path,
    gateway: Gateway,
) -> Path:
    """Two stages, and the four versions in their registry; the first is in production."""
    directory = tmp_path_factory.mktemp("deploying")
    for name, answer in ANSWERS.items():
        rows = [{"prompt": f"What is the colour of {i}?", "completion": answer} for i in range(40)]
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = "".join(TASK.format(name=name, rank=4 + i) for i, name in enumerate(ANSWERS))
    recipe = directory / "recipe.yaml"
    recipe.write_text(f"base: {base}\nrun_directory: run\ntasks:\n{tasks}")
    manylora("train", str(recipe))
    for name in ANSWERS:
        registry.publish(NAME, directory / "run/adapters" / name, base=identity)
    registry.set_alias(NAME, "production", 1)
    engine = {"slots": 2, "max_rank": 16, "max_context": 512, "max_concurrent": 8}
    write_stage(
        directory / "stages/staging",
        base=base,
        registry=registry_directory,
        gateway={"engine": {**engine, "kv_cache_gib": 1}},
    )
    production = write_stage(
        directory / "stages/production",
        base=base,
        registry=registry_directory,
        gates=GATES,
        connect={"inference": gateway.inference, "admin": gateway.admin},
    )
    (production / "suite.yaml").write_text(json.dumps(SUITE))
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Name the colour."},
                {"role": "user", "content": f"What is the colour of {100 + i}?"},
            ]
        }
        for i in range(12)
    ]
    (production / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory / "stages"


@contextmanager
def asking(gateway: Gateway) -> Iterator[None]:
    """A client that asks production all the while, and nothing of it may fail."""
    stop, failures, answers = threading.Event(), list[str](), itertools.count()

    def ask() -> None:
        with gateway.client() as client:
            while not stop.wait(PACE_S):
                question = f"What is the colour of {next(answers)}?"
                try:
                    client.generate([{"role": "user", "content": question}], NAME, max_tokens=4)
                except ClientError as error:
                    failures.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert next(answers) > 5


# It trains, starts a second gateway and promotes three times.
@pytest.mark.timeout(2400)
def test_versions_earn_their_way_to_production(
    stages: Path, gateway: Gateway, registry: Registry
) -> None:
    def begin(script: str, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [ROOT / "deploy" / script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, MANYLORA_STAGES=str(stages), HF_HUB_OFFLINE="1"),
        )

    def run(script: str, *arguments: str) -> tuple[int, str]:
        process = begin(script, *arguments)
        out, err = process.communicate(timeout=800)
        assert "Traceback" not in err
        return process.returncode, err if process.returncode else out

    def production() -> int:
        return registry.aliases(NAME)["production"].version

    def division() -> dict[int, int]:
        with grpc.insecure_channel(gateway.admin) as channel:
            request = admin_pb2.GetRolloutRequest(adapter=NAME)
            rollout = AdminServiceStub(channel).GetRollout(request, timeout=30).rollout
        return {share.version.number: share.percent for share in rollout.shares}

    try:
        status, said = run("up", "staging", "--json")
        assert status == 0, said
        process = psutil.Process(json.loads(said)["pid"])
        with asking(gateway):
            # A good version, whose script is killed in the middle of its canary.
            assert run("candidate", f"{NAME}@2") == (0, f"staging serves {NAME}@2\n")
            promoting = begin("promote", NAME)
            assert wait_until(lambda: 2 in division(), within_s=600)
            promoting.kill()
            promoting.communicate()
            assert production() == 1
            assert 2 in division()
            assert run("promote", NAME) == (0, f"production serves {NAME}@2\n")
            assert (production(), division()) == (2, {2: 100})

            # One that answers wrongly does not pass the gate.
            assert run("candidate", f"{NAME}@3")[0] == 0
            status, said = run("promote", NAME)
            assert status == 1
            assert f"the gates of production are closed to {NAME}@3" in said
            assert (production(), division()) == (2, {2: 100})

            # One that passes it and does not stop talking is taken back by itself.
            assert run("candidate", f"{NAME}@4")[0] == 0
            status, said = run("promote", NAME)
            assert status == 1
            assert f"{NAME}@4 was taken back at canary 20 %" in said
            assert "tokens, more than 2 times the present version's" in said
            assert (production(), division()) == (2, {2: 100})

            # And back in one command.
            assert run("rollback", NAME, "--stage", "production")[0] == 0
            assert (production(), division()) == (1, {1: 100})
        kept = registry.deployments(NAME, stage="production")
        assert [
            (one.action, one.version, one.outcome) for one in kept if one.outcome != "passed"
        ] == [
            ("alias", 1, "done"),
            ("promote", 2, "done"),
            ("promote", 3, "refused"),
            ("promote", 4, "rolled-back"),
            ("rollback", 1, "done"),
        ]
    finally:
        assert run("down", "staging")[0] == 0
    # Nobody may have asked yet how it ended: its parent, `deploy/up`, is gone.
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
