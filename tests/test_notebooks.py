"""The notebooks run from a clean kernel, and what is checked in is a finished run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("01_curvature_bias", "02_debiased_cg", "03_debiased_laplace", "04_your_model")
MAX_BYTES = 600_000
KERNEL = "running-interpreter"


def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncKernelManager:
    """A kernel of the interpreter that runs the tests; nothing is installed, nothing shared."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are shown in the notebook
    specification = tmp_path / "kernels" / KERNEL / "kernel.json"
    specification.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specification.write_text(
        json.dumps({"argv": command, "display_name": KERNEL, "language": "python"})
    )
    specifications = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])
    return AsyncKernelManager(kernel_name=KERNEL, kernel_spec_manager=specifications)


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_clean_kernel(name: str, kernel: AsyncKernelManager, tmp_path: Path) -> None:
    # Away from the repository: a notebook needs the installed package and nothing beside it.
    resources = {"metadata": {"path": str(tmp_path)}}
    fresh = notebook(name)
    NotebookClient(fresh, km=kernel, timeout=600, resources=resources).execute()
    shown = {output.output_type for cell in fresh.cells for output in cell.get("outputs", [])}
    assert "error" not in shown
    assert "display_data" in shown or "execute_result" in shown


@pytest.mark.parametrize("name", NAMES)
def test_what_is_checked_in_is_a_finished_run_of_modest_size(name: str) -> None:
    cells = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_place_on_one_machine_and_reads_cifar_from_none_by_default(name: str) -> None:
    texts = [cell.source for cell in notebook(name).cells]
    texts += [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in notebook(name).cells
        for output in cell.get("outputs", [])
    ]
    assert not [t for t in texts if re.search(r"(?<![\w.:/])/(?:home|work|tmp|usr|root)\b", t)]
    settings = re.findall(r"^CIFAR10 = (.*)$", "\n".join(texts), flags=re.MULTILINE)
    assert settings == ([] if name == "04_your_model" else ["None"])
