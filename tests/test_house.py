"""The rules of the house that a program can check: who imports whom, sizes, the file map, what is installed."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "llama4_jax": {"llama4_jax"},
    "data": {"data"},
    "training": {"training", "llama4_jax", "data"},
    "configs": {"configs", "training", "llama4_jax", "data"},
    "launch": {"launch", "configs", "training", "llama4_jax", "data"},
}
KERNELS_MAY_IMPORT = {"jax", "jaxtyping", "llama4_jax.kernels.tokamax"}
CONFIG_MODULES = ("llama4_jax/config.py", "data/config.py", "training/config.py")
SLOW_TO_IMPORT = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "torch", "transformers", "matplotlib"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
# Every field is public through the command line. A new experiment is a function in configs/, not a new field: raise
# this number only on purpose.
MAX_CONFIG_FIELDS = 125


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the repository, new ones included, ignored ones not."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(sorted(path for name in names.split("\0") if name and (path := ROOT / name).is_file()))


def sources(*folders: str) -> list[Path]:
    found = [p for p in tracked() if p.suffix == ".py" and (not folders or p.relative_to(ROOT).parts[0] in folders)]
    assert found, f"no sources in {folders}"
    return found


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, those inside functions included, relative ones resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def where(path: Path, line: int | None = None) -> str:
    return f"{path.relative_to(ROOT)}" + (f":{line}" if line else "")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str):
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in sources(package)
        for line, module in imported(path)
        if (top := module.split(".")[0]) in {*MAY_IMPORT, "tests", "tools"} and top not in MAY_IMPORT[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_import_only_jax():
    wrong = []
    for path in sources("llama4_jax"):
        parts = path.relative_to(ROOT).parts
        if parts[1] != "kernels":
            continue
        own = ".".join(parts[:-1])
        for line, module in imported(path):
            top = module.split(".")[0]
            allowed = {top, module.rpartition(".")[0]} & (KERNELS_MAY_IMPORT | sys.stdlib_module_names)
            if not (allowed or f"{module}.".startswith(f"{own}.")):
                wrong.append(f"{where(path, line)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_config_modules_import_nothing_heavy():
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in sources("llama4_jax", "data", "training")
        if path.name.endswith("config.py")
        for line, module in imported(path)
        if module.split(".")[0] in SLOW_TO_IMPORT
    ]
    assert not wrong, "\n".join(wrong)
    loaded = modules_after("\n".join(f"import {name.removesuffix('.py').replace('/', '.')}" for name in CONFIG_MODULES))
    assert not loaded & SLOW_TO_IMPORT


def test_sizes():
    wrong = []
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{where(path)} has {lines} lines, above {MAX_FILE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{where(path, node.lineno)} {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_einsum_letters_are_the_legends():
    """The legend stands in llama4_jax/axes.py; a module may add letters in a `Letters` paragraph of its docstring."""

    def letters(path: Path) -> set[str]:
        paragraphs = re.findall(r"^Letters.*?(?:\n\n|\Z)", ast.get_docstring(parse(path)) or "", re.S | re.M)
        return set(re.findall(r"\b[A-Z]\b", " ".join(paragraphs)))

    legend = letters(ROOT / "llama4_jax" / "axes.py")
    assert set("BTSDNKGHFERVLP") <= legend
    wrong = [
        f"{where(path, node.lineno)} einsum {spec!r}: {sorted(unknown)} not in the legend"
        for path in sources("llama4_jax", "training")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and "einsum" in (getattr(node.func, "attr", ""), getattr(node.func, "id", ""))
        if isinstance(node.args[0], ast.Constant) and (spec := str(node.args[0].value))
        if (unknown := set(re.findall(r"[A-Za-z]", spec)) - legend - letters(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_readme_maps_every_source():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"(?<![\w./-])[\w./-]+\.py\b", readme))
    names = {str(p.relative_to(ROOT)) for p in sources() if p.relative_to(ROOT).parts[0] != "tests"}
    full = {name for name in names if not (name.endswith("__init__.py") and not (ROOT / name).read_text().strip())}
    assert not full - mapped, f"README.md does not name {sorted(full - mapped)}"
    gone = {name for name in mapped if name.split("/")[0] in {*MAY_IMPORT, "tools"}} - names
    assert not gone, f"README.md names {sorted(gone)}, which do not exist"


def dataclasses_within(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from dataclasses_within(argument)


def test_config_fields_stay_few():
    """Leaves reachable from RunConfig, those of a class that is used in several places counted once."""
    from training.config import RunConfig

    seen: dict[type, list[str]] = {}
    todo: list[type] = [RunConfig]
    while todo:
        if (cls := todo.pop()) in seen:
            continue
        seen[cls] = []
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            inner = list(dataclasses_within(hints[field.name]))
            todo += inner
            seen[cls] += [] if inner else [field.name]
    count = sum(map(len, seen.values()))
    table = "\n".join(f"{cls.__name__}: {', '.join(fields)}" for cls, fields in seen.items())
    assert count <= MAX_CONFIG_FIELDS, f"{count} config fields, above {MAX_CONFIG_FIELDS}:\n{table}"


def test_no_other_distribution_ships_our_packages():
    owners = importlib.metadata.packages_distributions()
    others = {name: set(owners.get(name, ())) - {"llama4_jax", "llama4-jax"} for name in MAY_IMPORT}
    assert not any(others.values()), {name: by for name, by in others.items() if by}


def test_constraints_pin_every_requirement():
    def name(requirement: str) -> str:
        found = re.match(r"[\w.-]+", requirement)
        assert found, requirement
        return re.sub(r"[-_.]+", "-", found[0]).lower()

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not wrong, f"not plain pins: {wrong}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {name(r) for r in project["dependencies"] + extras["test"] + extras["verify"] + extras["llama"]}
    wanted |= {name(r) for r in extras["quant"] + extras["hf-tokenizers"]}
    missing = wanted - {name(line) for line in lines} - {"llama4-jax"}
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"


def test_nothing_of_one_machine_or_registry():
    places = re.compile(
        r"(?<![\w.])/(work|root|home/\w+|Users/\w+)/"
        r"|\b(pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|docker\.io|ghcr\.io|quay\.io)\b"
        r"|\b(nvcr\.io|[\w-]*gcr\.io|[\w-]+docker\.pkg\.dev)\b"
    )
    wrong = []
    for path in tracked():
        if path == Path(__file__).resolve() or b"\0" in (content := path.read_bytes()):
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if found := places.search(line):
                wrong.append(f"{where(path, number)} names {found[0]}")
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles():
    """Files from elsewhere are data: nothing that could run them is imported or asked for."""
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in sources(*MAY_IMPORT, "tools")
        for line, module in imported(path)
        if module.split(".")[0] in banned
    ]
    for path in sources(*MAY_IMPORT, "tools"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                asks = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
                reads_yaml = name.startswith("yaml.") and "load" in name
                if reads_yaml or name in (
                    "eval",
                    "exec",
                    "torch.load",
                    "pandas.read_pickle",
                    "pd.read_pickle",
                    "os.system",
                ):
                    wrong.append(f"{where(path, node.lineno)} calls {name}")
                if asks.get("allow_pickle", "False") != "False" or asks.get("trust_remote_code", "False") != "False":
                    wrong.append(f"{where(path, node.lineno)} {name} is to run what it reads")
                if asks.get("shell", "False") != "False":
                    wrong.append(f"{where(path, node.lineno)} {name} goes through a shell")
    assert not wrong, "\n".join(wrong)


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded once `code` has run in a process of its own."""
    show = 'import sys; print("\\nLOADED", *{name.split(".")[0] for name in sys.modules})'
    done = run(sys.executable, "-c", f"{code}\n{show}")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def subcommands() -> list[str]:
    text = run(str(Path(sys.executable).parent / "llama4"), "--help").stdout
    found = re.search(r"\{([\w,-]+)\}", text)
    assert found, f"no list of subcommands in:\n{text}"
    return found[1].split(",")


def test_help_imports_nothing_heavy():
    for command in [[], *([name] for name in subcommands())]:
        loaded = modules_after(
            f"import sys; sys.argv = {['llama4', *command, '--help']!r}\n"
            "from launch.cli import main\n"
            "try:\n    status = main()\nexcept SystemExit as error:\n    status = error.code\n"
            "assert not status, status"
        )
        assert not loaded & SLOW_TO_IMPORT, f"llama4 {' '.join(command)} --help imports {loaded & SLOW_TO_IMPORT}"


def test_found_from_a_folder_with_a_data_of_its_own(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.jsonl").write_text("{}\n")
    done = run(sys.executable, "-c", "import data; print(data.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()) == ROOT / "data" / "__init__.py", done.stderr

    (tmp_path / "data" / "__init__.py").write_text("raise ImportError('the wrong data')\n")
    done = run(str(Path(sys.executable).parent / "llama4"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
