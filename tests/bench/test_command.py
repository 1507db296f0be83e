"""What the command says and keeps of methods before it runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.methods import HanSample, Ren, Wen, methods
from bench.paper.choose import most_rows, parameters
from bench.paper.inputs import BadInput
from bench.paper.settings import keep
from bench.paper.work import Amount
from fastguard import testbed


def kept(method: Any, batch: int = 32) -> dict[str, Any]:
    amount = Amount(scale=7.5, scales=(), seeds=4, ordinary=1, detection=0, batch=batch)
    return {"m": parameters(method, amount)}


def test_a_method_of_other_parameters_is_refused(tmp_path: Path) -> None:
    keep(tmp_path, {}, kept(Ren(1.25)))
    keep(tmp_path, {}, kept(Ren(1.25), batch=1))
    with pytest.raises(BadInput, match=r"method m: .*1\.25.* there, .*1\.5.* now"):
        keep(tmp_path, {}, kept(Ren(1.5)))


def test_a_batch_below_a_prompts_seeds_is_another_wen(tmp_path: Path) -> None:
    keep(tmp_path, {}, kept(Wen(1.0)))
    keep(tmp_path, {}, kept(Wen(1.0), batch=4))
    with pytest.raises(BadInput, match="1 problem, nothing was done\n  method m: "):
        keep(tmp_path, {}, kept(Wen(1.0), batch=3))


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (methods()["dtp"](), 20),
        (Wen(0.0), 2 * (10 + 10)),
        (methods()["han-batch"](), 20 + 8 - 5),
        (HanSample(target=0, iterations=3), 2 * (10 + 3)),
        (methods()["first-look"](), 12),
        (methods()["reference-og+dtp"](), 100),
    ],
)
def test_rows_ahead_are_no_fewer_than_they_will_be(method: Any, rows: int) -> None:
    made = method(testbed.load(), ["a red apple"], [torch.Generator()], num_inference_steps=10, guidance_scale=7.5)
    assert made.rows <= most_rows(method, 10) == rows
