"""Every command of the benchmark refuses names that it does not know, before any work."""

from __future__ import annotations

import sys

import pytest

from bench import batches, gpu, pipeline


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (batches.main, ["--parts", "speed", "kil"], "invalid choice: 'kil'"),
        (pipeline.main, ["--policies", "cfg", "nothing"], "--policies: policy='nothing': allowed are cfg, "),
        (pipeline.main, ["--policies", "nothing.json"], "--policies: "),
        (pipeline.main, ["--schedulers", "nothing"], "invalid choice: 'nothing'"),
        (gpu.main, ["--only", "nothing"], "invalid choice: 'nothing'"),
        (gpu.main, ["--sizes", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_unknown_names_are_refused(main, arguments, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
