import json
from pathlib import Path

import pytest

from shared.fields import RunControl
from shared.run.seeds import each_seed, report_seeds

SIZES = {"global_batch_size": 8, "max_steps": 2, "max_grad_norm": 1.0, "seed": 3}


def test_one_run_and_a_dry_run_stay_in_their_folder() -> None:
    control = RunControl(output_dir="runs/a", **SIZES)
    assert list(each_seed(control, 1)) == [control]
    dry = RunControl(output_dir="runs/a", dry_run=True, **SIZES)
    assert list(each_seed(dry, 5)) == [dry]


def test_several_seeds_have_folders_of_their_own_and_one_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    control = RunControl(output_dir=str(tmp_path), **SIZES)
    runs = list(each_seed(control, 3))
    assert [run.seed for run in runs] == [3, 4, 5]
    for run, score in zip(runs, (0.2, 0.4, 0.9), strict=True):
        folder = Path(run.output_dir)
        assert folder.parent == tmp_path
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"evaluation": {"eval/accuracy": score}}))
    report_seeds(control, 3)
    summary = json.loads((tmp_path / "seeds.json").read_text())["eval/accuracy"]
    assert summary["values"] == [0.2, 0.4, 0.9]
    assert (summary["mean"], summary["standard_error"]) == (pytest.approx(0.5), pytest.approx(0.2081666))
    assert "eval/accuracy 0.5000 +- 0.2082" in capsys.readouterr().out
    (tmp_path / "seeds.json").unlink()
    monkeypatch.setenv("RANK", "1")
    report_seeds(control, 3)
    assert not (tmp_path / "seeds.json").exists()
