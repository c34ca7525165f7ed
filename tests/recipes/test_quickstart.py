"""The notebook runs from an empty folder, as in Colab, and holds no outputs."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "recipes" / "quickstart.ipynb"
TINY = "--hidden_size 32 --num_layers 1 --max_steps 12 --warmup_steps 2 --data shared/samples/novels/eval.parquet"


def test_it_holds_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_it_runs_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small runs; nothing is pushed."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for variable in ("HF_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    empty = tmp_path / "empty"
    empty.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    values = {"REPOSITORY": str(ROOT), "PRETRAINING": TINY}
    values["FINETUNING"] = "--max_steps 4 --warmup_steps 1 --eval_answers 8 --train_fraction 0.02"
    given = [f"{name} = {value!r}" for name, value in values.items()]
    notebook.cells[1].source += "\n" + "\n".join(given)
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(empty)}})
    client.execute()
    said = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    run_dir = empty / "pretraining-recipes" / "outputs"
    assert (run_dir / "gpt" / "model.safetensors").is_file(), said
    assert (run_dir / "gpt_finetuned" / "model.safetensors").is_file(), said
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert "image/png" in kinds
    assert not [text for text in said if "error:" in text or "Traceback" in text]
