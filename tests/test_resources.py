"""Configs and the miniature atlas are found in a checkout and in an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from omnisapiens_jax import resources

REPO = Path(__file__).resolve().parents[1]


def tracked(folder: str) -> set[str]:
    """Files of `folder` that git tracks, as paths from the repository's root."""
    listed = subprocess.run(["git", "ls-files", "-z", folder], cwd=REPO, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (REPO / name).exists()}


def test_a_checkout_answers_with_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a copy lies inside the package: an edited config must count."""
    (tmp_path / "pyproject.toml").touch()
    for root in (tmp_path, tmp_path / "omnisapiens_jax" / "_resources"):
        (root / "configs").mkdir(parents=True)
        (root / "configs" / "rl.py").touch()
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "omnisapiens_jax")
    assert resources.resource("configs/rl.py") == tmp_path / "configs" / "rl.py"


def test_an_installed_package_answers_from_inside_and_ignores_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "omnisapiens_jax"
    inside = package / "_resources" / "configs"
    inside.mkdir(parents=True)
    (tmp_path / "site-packages" / "configs").mkdir()  # somebody else's
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resources.resource("configs") == inside


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks of 64 kB, of which the last alone stays, lie below the heap's top: freed, and still resident."""
    code = """
    from omnisapiens_jax.resources import give_back_memory

    def resident():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

    before = resident()
    blocks = [bytearray(b"x") * 2**16 for _ in range(3200)]
    last = blocks.pop()
    del blocks
    freed = resident()
    give_back_memory()
    print(freed - before, resident() - before)
    """
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"GLIBC_TUNABLES": ""}, capture_output=True, check=True
    )
    freed, after = map(float, told.stdout.split())
    assert freed > 150  # MiB
    assert after < 20


def test_a_missing_resource_says_where_it_looked() -> None:
    with pytest.raises(FileNotFoundError, match=r"no resource 'configs/nowhere\.py': not at .*/configs/nowhere\.py or .*_resources"):
        resources.resource("configs/nowhere.py")


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "data/../../secret"])
def test_only_the_repository_is_searched(path: str) -> None:
    with pytest.raises(ValueError, match="inside the repository"):
        resources.resource(path)


@pytest.mark.slow
def test_the_wheel_carries_configs_and_data(tmp_path: Path) -> None:
    """Builds the wheel, installs it alone into an empty environment, and asks it for every tracked file of configs/ and data/."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, REPO], check=True)
    (wheel,) = tmp_path.glob("omnisapiens_jax-*.whl")
    wanted = tracked("configs") | tracked("data")
    assert wanted
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    assert {f"omnisapiens_jax/_resources/{name}" for name in wanted} <= carried
    foreign = {name for name in carried if not name.startswith("omnisapiens_jax")}
    assert not foreign, f"the wheel would scatter {sorted(foreign)[:5]} over site-packages"

    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    subprocess.run([*pip, "--python", home / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    code = (
        "import sys\nfrom omnisapiens_jax.resources import resource\n"
        "for line in sys.stdin:\n    assert '_resources' in str(resource(line.rstrip())), line"
    )
    subprocess.run([home / "bin" / "python", "-c", code], input="\n".join(sorted(wanted)), text=True, cwd=tmp_path, check=True)
