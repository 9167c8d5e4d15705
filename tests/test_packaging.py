"""What is declared in one place agrees with what is declared in the others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
CONDA_NAMES = {"torch": "pytorch-gpu"}


def test_conda_environment_agrees_with_pyproject():
    conda = dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in CONDA if isinstance(line, str))
    for requirement in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)(>=[\d.]+)(?:;.*)?", requirement).groups()
        assert conda.pop(CONDA_NAMES.get(name, name)) == bound, requirement
    assert conda.pop("python").startswith(PROJECT["requires-python"])
    assert list(conda) == ["pip"]
    (pip,) = (entry["pip"] for entry in CONDA if isinstance(entry, dict))
    (extras,) = re.fullmatch(r"-e \.\[([\w,-]+)\]", pip[0]).groups()
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_lock_pins_every_requirement_within_its_bounds():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))
    pins = {name.lower(): version for name, version in pins.items()}

    def numbers(version):
        return [int(n) for n in re.findall(r"\d+", version)]

    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["onnx"] + extras["bench"] + extras["experiments"] + extras["dev"][1:]
    for requirement in wanted:
        name, bound = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
        assert numbers(pins[name.lower()]) >= numbers(bound), requirement


@pytest.mark.parametrize(
    "target", ("test", "bench", "install", "reproduce-all", "gpu", "tables", "figures", "report", "docs")
)
def test_make_help_lists_the_commands(target):
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target} " in text


def test_library_knows_nothing_of_experiments():
    """Imports run one way: ops, then layers; no configuration or logging framework in the library."""
    program = "import sys, minrnn, minrnn.ops; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"hydra", "omegaconf", "wandb", "onnx", "onnxscript", "experiments", "numba"} & set(loaded)
