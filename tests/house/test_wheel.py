"""The wheel as a stranger gets it: built, installed where no checkout is in reach, run from somewhere else."""

import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` directory of an environment with the wheel and, of this one, all packages but the editable hf_prune."""
    place = tmp_path_factory.mktemp("wheel")
    # no isolation: an isolated build would download what is installed here
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, ROOT, cwd=place)
    (wheel,) = place.glob("hf_prune-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", place / "clean", cwd=place)
    binaries = place / "clean" / "bin"
    own = Path(
        run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
    )
    # a directory that a .pth file names is searched, but its own .pth files, the editable install among them, are not read
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=place)
    return binaries


def test_hf_prune_recipes_lists_what_is_shipped(installed, tmp_path):
    listed = run(installed / "hf-prune", "recipes", cwd=tmp_path)
    shipped = [path.stem for path in (ROOT / "recipes").glob("*.yaml")]
    assert shipped
    assert [name for name in shipped if name not in listed] == []


def test_recipes_come_from_the_wheel(installed, tmp_path):
    program = "from hf_prune.recipe.shipped import shipped_recipes; print(*shipped_recipes().values(), sep='\\n')"
    paths = [Path(line) for line in run(installed / "python", "-c", program, cwd=tmp_path).split()]
    assert {path.name for path in paths} == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    for path in paths:
        assert path.parent.parts[-2:] == ("hf_prune", "_recipes")
        assert path.is_relative_to(installed.parent)
        assert path.read_bytes() == (ROOT / "recipes" / path.name).read_bytes()


def test_every_file_of_the_package_is_in_the_wheel(installed, tmp_path):
    program = "import hf_prune; print(hf_prune.__file__)"
    package = Path(run(installed / "python", "-c", program, cwd=tmp_path).strip()).parent
    assert package.is_relative_to(installed.parent)
    files = [path.relative_to(ROOT / "hf_prune") for path in (ROOT / "hf_prune").rglob("*") if path.is_file()]
    missing = [str(path) for path in files if "__pycache__" not in path.parts and not (package / path).is_file()]
    assert missing == []


def test_the_version_is_said_once(installed, tmp_path):
    program = (
        "import hf_prune; from importlib.metadata import version; print(hf_prune.__version__, version('hf_prune'))"
    )
    here, there = run(installed / "python", "-c", program, cwd=tmp_path).split()
    assert here == there == distribution("hf_prune").version
