"""The files that make an environment and a pipeline agree with one another and with the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/earthprior"
SOURCES = sorted(PACKAGE.rglob("*.py"))
STAGES = ("stats", "pretrain", "evaluate")
# Read by every stage, and no result depends on them: they parse, record and report. A change in them reruns nothing.
WITHOUT_EFFECT = {
    "__init__",
    "__main__",
    "cli",
    "errors",
    "files",
    "handover",
    "identity",
    "journal",
    "made_of",
    "memory",
    "mirror",
    "mlflow_read",
    "mlflow_run",
    "naming",
    "outbox",
    "params",
    "pictures",
    "recorded",
    "tracking",
    "tracking_store",
    "tracking_view",
    "under_dvc",
}


def read_yaml(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("-")]
    assert all(len(pair) == 2 for pair in pairs), f"{name}: every line pins one version"
    assert len({canonical(package) for package, _ in pairs}) == len(pairs), f"{name}: a package is listed twice"
    return {canonical(package): version for package, version in pairs}


def flat_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield from flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at any depth, except for type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_file(name: str) -> Path | None:
    """The file that `earthprior.a.b` is or that defines b, also where a package passes it on; None for others."""
    if name.split(".")[0] != "earthprior":
        return None
    path = ROOT / "src" / Path(*name.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    if path.parent.with_suffix(".py").is_file():
        return path.parent.with_suffix(".py")
    passed_on = [source for source in imports(path.parent / "__init__.py") if source.split(".")[-1] == path.name]
    return module_file(passed_on[0]) if passed_on else path.parent / "__init__.py"


def sources_of(stage: str, folder: str = "stages") -> set[str]:
    """Every file of ours that a stage can come to run, as a path in the repository."""
    found: set[Path] = set()
    waiting = [PACKAGE / f"{folder}/{stage}.py"]
    while waiting:
        path = waiting.pop()
        if path not in found and path.relative_to(PACKAGE).with_suffix("").parts[0] not in WITHOUT_EFFECT:
            found.add(path)
            waiting += [file for name in imports(path) if (file := module_file(name))]
            found.update(path.parent.glob(f"{path.stem}.*.j2"))
    # an __init__.py that says nothing but what its package is changes nothing either
    return {path.relative_to(ROOT).as_posix() for path in found if path.name != "__init__.py" or [*imports(path)]}


def own_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and path.parts[len(ROOT.parts)] != "sample_remote"]


def test_requirements_are_constrained() -> None:
    # pip ignores constraints.txt unless it is named, and conda.yaml and MLflow know only requirements.txt
    assert (ROOT / "requirements.txt").read_text().splitlines()[0] == "-c constraints.txt"
    required, allowed = pins("requirements.txt"), pins("constraints.txt")
    assert required.items() <= allowed.items()


def test_no_pin_is_local() -> None:
    # PyPI has no such file as torch 2.13.0+cpu
    assert not [version for version in pins("constraints.txt").values() if "+" in version]


def test_conda_uses_the_same_list() -> None:
    dependencies = read_yaml("conda.yaml")["dependencies"]
    assert dependencies == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]


def test_every_import_is_required() -> None:
    required = pins("requirements.txt")
    distributions = packages_distributions()
    for path in SOURCES:
        for name in {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"earthprior"}:
            known = {canonical(distribution) for distribution in distributions[name]}
            assert known & required.keys() or name == "ruamel", f"{path.name} imports {name}: not in requirements.txt"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("rasterio", "chips/"),
        ("mlflow", "mlflow_"),
        ("optuna", "tuning/"),
        ("click", "cli.py"),
        ("diffusers", "diffusion/sample.py"),
        ("pytorch_optimizer", "training/optim.py"),
        ("torchvision", "nowhere"),
    ],
)
def test_package_stays_in_its_place(package: str, allowed: str) -> None:
    users = [
        path.relative_to(PACKAGE).as_posix() for path in SOURCES if package in {n.split(".")[0] for n in imports(path)}
    ]
    assert not [user for user in users if not user.startswith(allowed)]


def test_every_module_loads_without_torchvision() -> None:
    modules = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in SOURCES]
    program = "import importlib, sys\nsys.modules['torchvision'] = None\n"
    program += "for name in sys.argv[1:]: importlib.import_module(name)"
    run_python(program, *[name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")])


def test_stats_loads_neither_torch_nor_mlflow() -> None:
    # they cost seconds and hundreds of megabytes, which each reader process and every `--help` would pay
    program = "import sys, earthprior.cli, earthprior.stages.stats\n"
    program += "sys.exit(', '.join({'torch', 'mlflow'} & sys.modules.keys()) or 0)"
    run_python(program)


def run_python(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_stages_are_those_of_the_package() -> None:
    stages = read_yaml("dvc.yaml")["stages"]
    assert tuple(stages) == STAGES
    for name, stage in stages.items():
        # one simple command: with a shell in between, a stage does not notice that dvc died
        assert stage["cmd"] == f"env PYTHONPATH=src python -m earthprior {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_sources_it_runs(stage: str) -> None:
    listed = [path for path in read_yaml("dvc.yaml")["stages"][stage]["deps"] if path.startswith("src/")]
    assert not [path for path in listed if not (ROOT / path).exists()]
    needed = sources_of(stage)
    covered = {source for source in needed if any(source == path or source.startswith(f"{path}/") for path in listed)}
    assert needed == covered, "missing in dvc.yaml"
    assert not [path for path in listed if not any(s == path or s.startswith(f"{path}/") for s in needed)], "not used"


def test_only_stats_depends_on_the_chips() -> None:
    # at 100,000 chips each stage that does costs 20 s of CPU per experiment; stats.json carries the chips' md5
    stages = read_yaml("dvc.yaml")["stages"]
    assert [name for name in STAGES if "data" in stages[name]["deps"]] == ["stats"]
    assert [name for name in STAGES if "results/stats/stats.json" in stages[name]["deps"]] == ["pretrain", "evaluate"]


def test_only_metrics_and_plots_are_uncached() -> None:
    # a plain out with `cache: false` turns DVC's run cache off for its stage
    for stage in read_yaml("dvc.yaml")["stages"].values():
        assert not [
            out for out in stage["outs"] if isinstance(out, dict) and out[next(iter(out))].get("cache") is False
        ]


def test_params_lists_name_existing_keys() -> None:
    keys = set(flat_keys(read_yaml("params.yaml")))
    sections = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    for name, stage in read_yaml("dvc.yaml")["stages"].items():
        assert not [key for key in stage["params"] if key not in keys | sections], name


def test_every_key_but_operation_reruns_something() -> None:
    keys = set(flat_keys(read_yaml("params.yaml")))
    listed = {key for stage in read_yaml("dvc.yaml")["stages"].values() for key in stage["params"]}
    covered = {key for key in keys if key in listed or key.split(".")[0] in listed}
    assert keys - covered == {key for key in keys if key.split(".")[0] in ("operation", "tune")}


def test_no_key_that_the_run_cache_ignores() -> None:
    # DVC drops keys of these names from what it compares, and restores stale results (DVC issue 10296)
    assert not [key for key in flat_keys(read_yaml("params.yaml")) if {"size", "nfiles"} & set(key.split("."))]


def test_no_machine_paths() -> None:
    pattern = re.compile(r"(?<![\w.~}/-])/(?:work|root|home|Users)/\w")
    found = []
    for path in own_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found


def test_ci_runs_what_make_offers() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = re.findall(r"^make (\w+)", script.read_text(), re.MULTILINE)
    assert asked == ["lint", "test"]
    assert {*asked, "run", "sample", "clean", "help"} <= targets


def test_sample_remote_is_not_the_default() -> None:
    # `dvc push` of somebody's chips must fail until they name a remote of their own
    config = (ROOT / ".dvc/config").read_text()
    assert "remote =" not in config
    assert re.search(r"\['remote \"sample\"'\]\n\s+url = \.\./sample_remote", config)
