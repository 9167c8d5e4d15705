"""The notebooks run from top to bottom, on this Python, and leave the results as they were."""

import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"figures": None, "quickstart": 1, "scan_numerics": 2}  # None: as many as it drew, whatever the records give


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of what the notebooks read: the folders here may change under a test, when runs are going on."""
    for name in ("notebooks", "configs", "experiments", "scripts", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return tmp_path


def state_of(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def execute(notebook, folder: Path, monkeypatch) -> None:
    """In place, on this Python whatever kernels are installed, and through files, since ports may be taken."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader runs it
    monkeypatch.delenv("MPLBACKEND", raising=False)
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 100 characters or so
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", short)
        monkeypatch.setenv("IPYTHONDIR", short)
        specs = KernelSpecManager(kernel_dirs=[])  # what is left is ipykernel's own
        kernel = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=specs, transport="ipc", ip=f"{short}/kernel"
        )
        client = NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.execute(cleanup_kc=True)  # a kernel that it was given would live on


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == sorted(PICTURES)


# From its own folder, as Jupyter does, and from the repository's root.
@pytest.mark.parametrize("name, folder", [("figures", ""), ("quickstart", "notebooks"), ("scan_numerics", "notebooks")])
def test_notebook_runs_and_changes_no_file(name, folder, checkout, monkeypatch):
    notebook = nbformat.read(checkout / "notebooks" / f"{name}.ipynb", as_version=4)
    torch_free = "assert 'torch' not in sys.modules; " if name == "figures" else ""
    notebook.cells.append(nbformat.v4.new_code_cell(f"{torch_free}print(sys.executable, root, sep='\\n')"))
    before = state_of(checkout)
    execute(notebook, checkout / folder, monkeypatch)
    after = state_of(checkout)
    assert [str(path) for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)] == []

    found = outputs(notebook)
    assert [output for output in found if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert found[-1].text.splitlines() == [sys.executable, str(checkout)]
    pictures = sum("image/png" in output.get("data", {}) for output in found)
    drawn = PICTURES[name] or int(re.search(r"(\d+) figures", found[0].text)[1])
    assert pictures == drawn > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_bare_and_defines_nothing(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert path.stat().st_size < 20_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id
            program = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
            defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
            assert not [node for node in ast.walk(ast.parse(program)) if isinstance(node, defined)], cell.id
