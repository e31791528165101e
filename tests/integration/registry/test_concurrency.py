"""Several processes at once on one registry: nothing is lost, nothing is done twice."""

import json
import subprocess
import sys
from pathlib import Path

RACER = Path(__file__).parent / "racer.py"
RACERS = 4
ADAPTERS = 5
MOVES = 25


def race(commands):
    """Starts all, lets them go together, and returns what each says at its end."""
    racers = [
        subprocess.Popen(
            [sys.executable, RACER, *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [json.loads(racer.communicate(timeout=500)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers)
    return results


def test_many_publishers_and_movers_lose_nothing(place, tmp_path, make_adapter, base_file):
    shared = make_adapter(0)
    own = [[make_adapter(100 * n + i + 1) for i in range(ADAPTERS)] for n in range(RACERS)]
    cache = tmp_path / "cache"

    results = race(
        [place.database, place.blobs, cache, base_file, MOVES, shared, *directories]
        for directories in own
    )

    numbers = [
        number
        for result in results
        for directory, number in result["published"].items()
        if directory != str(shared)
    ]
    total = RACERS * ADAPTERS + 1
    assert {result["published"][str(shared)] for result in results} <= set(range(1, total + 1))
    assert len({result["published"][str(shared)] for result in results}) == 1
    assert sorted({*numbers, results[0]["published"][str(shared)]}) == list(range(1, total + 1))
    assert len(numbers) == len(set(numbers))
    with place.open() as registry:
        report = registry.verify()
        assert report.problems == ()
        assert (report.versions, report.moves) == (total, RACERS * MOVES)
        generations = [move.generation for move in registry.history("spelling")]
        assert generations == list(range(1, RACERS * MOVES + 1))
        events = registry.events()
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert len(events) == total + RACERS * MOVES
        for version in registry.versions("spelling"):
            target = cache / version.digest.removeprefix("sha256:")
            assert registry.materialize(version, cache) == target
    assert list(cache.glob(".*.partial")) == []


def test_a_watcher_in_another_process_misses_nothing(place, tmp_path, make_adapter, base_file):
    with place.open() as registry:
        adapters = [make_adapter(1), make_adapter(2)]
        command = [place.database, place.blobs, tmp_path / "cache", base_file, 10, *adapters]
        watched = registry.watch(0, poll_seconds=0.001)

        race([command])

        seen = [next(watched) for _ in range(12)]
    assert [event.sequence for event in seen] == list(range(1, 13))
    assert [event.kind for event in seen] == ["published"] * 2 + ["alias_moved"] * 10
