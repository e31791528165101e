"""`python -m manylora_gateway.cpu_lora` tells right kernels from wrong ones."""

import json

import pytest

from manylora_gateway.cpu_lora.__main__ import main


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_are_right_and_vllms_own_are_not(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--slots 2 --rank 4 --width 16 --out 24 --prefill 40 --json --dtype"
    assert main([*small.split(), dtype]) == 0
    results = json.loads(capsys.readouterr().out)
    wrong = {(entry["kernels"], entry["batch"]): entry["wrong_rows"] for entry in results}
    assert wrong["ours", "decode"] == wrong["ours", "prefill"] == 0
    # Rows of the bare base, which get the last slot's adapter.
    assert wrong["stock", "decode"] == 4
