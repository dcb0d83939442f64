"""The components: what TorchX lists, what it says of them, what it refuses."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torchx.specs.finder import ComponentValidationException, ModuleComponentsFinder

from tests.launch.torchx import ROOT, torchx

OWN = ("cafe.bench.run", "cafe.dlrm.evaluate", "cafe.dlrm.train")


def component(name: str) -> Any:
    _, module, function = name.split(".")
    return getattr(
        importlib.import_module(f"torchrec_cafe_launch.torchx_components.{module}"), function
    )


def test_torchx_lists_ours_and_all_of_its_own():
    listed = re.findall(r"^ *\d+\. (.*)$", torchx("builtins").stdout, re.MULTILINE)
    builtins = ModuleComponentsFinder("torchx.components", "").find()
    own = {found.name for found in builtins if not found.validation_errors}
    assert {"dist.ddp", "metrics.tensorboard", "serve.torchserve", "utils.echo"} <= own
    assert set(listed) == own | set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_help_is_the_docstring(name: str, tmp_path: Path):
    done = torchx("run", name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    summary, _, arguments = inspect.getdoc(component(name)).partition("\n\nArgs:\n")
    assert " ".join(summary.split()) in shown
    described = re.findall(r"^ +(\w+): (.*)$", arguments, re.MULTILINE)
    assert [argument for argument, _ in described] == list(
        inspect.signature(component(name)).parameters
    )
    for argument, text in described:
        assert text in shown, argument


def test_components_are_imported_without_torch():
    """TorchX imports them for each component that it runs, on login nodes, too."""
    module = "torchrec_cafe_launch.torchx_components.dlrm"
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jobs_import_the_examples_from_the_checkout(tmp_path: Path):
    for cwd in (ROOT, tmp_path):
        done = torchx("run", "--dryrun", "-s", "local_cwd", "cafe.dlrm.train", cwd=cwd)
        assert f"'PYTHONPATH': '{ROOT}'" in done.stdout, done.stderr


def _installed(folder: Path) -> Any:
    """The module of a wheel: in another folder, without a checkout about."""
    path = folder / "site" / "torchrec_cafe_launch" / "torchx_components" / "job.py"
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / "torchx_components" / "job.py").read_text())
    spec = importlib.util.spec_from_file_location("installed_job", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheel_says_that_the_examples_are_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = _installed(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ComponentValidationException, match="Run this in a checkout, or say with"):
        job.python_path("", "examples.dlrm.train")
    assert job.python_path("/opt/cafe", "examples.dlrm.train") == "/opt/cafe"
    monkeypatch.chdir(ROOT)
    assert job.python_path("", "examples.dlrm.train") == str(ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument must be the name of a benchmark, as in `-- train_step --quick`"),
        (["--", "--quick"], "the first argument must be the name of a benchmark"),
        (["--", "nothing"], "benchmarks/nothing.py is not in .*; there are checkpoints, .*serving"),
    ],
)
def test_benchmarks_that_there_are_not(arguments: list[str], message: str):
    done = torchx("run", "--dryrun", "-s", "local_cwd", "cafe.bench.run", *arguments)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
