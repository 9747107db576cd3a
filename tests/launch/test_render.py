"""The files that `llama4 launch` renders: golden ones, valid ones, and hostile words that stay words."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT, error

from launch import cli
from launch.render import TARGETS, render
from launch.render.job import JobSpec, valid_name
from launch.render.shell import GPU_FLAGS
from tools import launch_files

GOLDEN = ROOT / "tests" / "golden" / "launch"
STUBS = {  # of the clients: each runs what would be run on a host, once
    "srun": 'shift $(($# - 3)); exec "$@"',
    "mpirun": 'shift $(($# - 3)); exec "$@"',
    "gcloud": 'case "$*" in *describe*) echo READY;; *" ssh "*) for w; do last=$w; done; '
              'exec bash -c "${last#--command=}";; '
              '*) echo secret;; esac',
    "scontrol": "exit 1",
    "llama4": 'case "$1 ${@: -1}" in train*) printf "%s\\0" "$@" > "$SEEN"; env -0 > "$SEEN.env";; '
              '*--complete) ;; *) exit 1;; esac',
}  # fmt: skip


@pytest.mark.parametrize("target", [*TARGETS, *launch_files.OTHERS])
def test_golden(target: str, capsys: pytest.CaptureFixture[str]):
    """As kept in tests/golden/launch and shown in docs/launch.md; `python -m tools.launch_files` writes both."""
    assert cli.main([*launch_files.words(launch_files.jobs()[target]), "--json"]) == 0
    text = launch_files.text_of(json.loads(capsys.readouterr().out))
    assert text == (GOLDEN / f"{target}.txt").read_text()


def test_the_documentation_shows_what_is_rendered():
    shown = launch_files.SHOWN.findall(launch_files.DOCS.read_text())
    assert {line.split()[2] for line, _, _ in shown} == {*TARGETS}
    for line, _, text in shown:
        assert text == (GOLDEN / f"{line.split()[2]}.txt").read_text()


# --- Hostile words

NASTY = st.sampled_from(["$(touch HACKED)", "`touch HACKED`", "'; touch HACKED; '", '"; touch HACKED; "', "a\nb: c",
                         "{{ x }}",
                         "$HOME", "$$(HOME)", "$(HOME)", "\\", "- x", "#", "!", "*", "~", "é\u2028", "\t", "", "null",
                         "yes",
                         "1e3", "&a", "*a", "%s", "{}", "rank", "EOF", "\x1b[31m"])  # fmt: skip
WORDS = st.lists(
    NASTY | st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"), max_size=12), max_size=4
)
NAMES = st.from_regex(r"[A-Z][A-Z0-9_]{0,8}", fullmatch=True).filter(
    lambda n: f"N_{n}" and not re.search("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", n)
)
SIZES = {
    "local": [("", 1)], "slurm": [("", 2), ("h100:3x8", 3)], "mpi": [("", 2), ("h100:3x8", 3)],
    "jobset": [("", 2), ("h100:3x8", 3), ("v5p:4x4x4", 16), ("v6e:4x4", 4)],
    "sky": [("", 2), ("h100:3x8", 3), ("v6e:4x4", 4)],
    "ray": [("", 2), ("h100:3x8", 3), ("v5p:4x4x4", 16)], "tpu-vm": [("v5p:4x4x4", 16), ("v5e:2x4", 1)],
    "xpk": [("v5p:4x4x4", 16), ("tpu7x:4x4x4", 16)],
}  # fmt: skip


@st.composite
def jobs(draw: st.DrawFn, targets: tuple[str, ...] = (*TARGETS,)) -> tuple[str, dict[str, Any]]:
    """A target, and the fields of a job for it (made into one in the test: what checks its types draws at random)."""
    target = draw(st.sampled_from(targets))
    topology, hosts = draw(st.sampled_from(SIZES[target]))
    chips = {"h100": 8, "tpu7x": 8, "": 1}.get(topology.partition(":")[0], 4)
    several = target in ("local", "mpi", "slurm") and not topology
    env = {
        f"N_{name}": value
        for name, value in draw(
            st.dictionaries(NAMES, st.sampled_from(["a b", "$(x)", "a\nb", "'\"", "\\n", "$$"]), max_size=3)
        ).items()
    }
    argv = ("train", *draw(WORDS))
    if target == "xpk":
        argv, env = (tuple(w.replace("\n", " ") for w in argv), {n: v.replace("\n", " ") for n, v in env.items()})
    return target, dict(
        name=valid_name(draw(st.text(max_size=50)) or "x"), argv=argv, folder="/shared/run", topology=topology,
        hosts=hosts,
        processes=draw(st.integers(1, 3)) if several else 1, devices=chips, image="registry/image:1",
        env=tuple(env.items()),
        secrets=(("A_TOKEN", "tokens/a"),) if target in ("jobset", "tpu-vm", "sky") and draw(st.booleans()) else (),
        grace=draw(st.integers(30, 3600)), restarts=draw(st.integers(0, 20)), zone="z-1", cluster="c", hostfile="hosts",
        queue=draw(st.sampled_from(["", "gpu"])), spot=draw(st.booleans()),
    )  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    for name, body in STUBS.items():
        if not (file := folder / name).exists():
            file.write_text(f"#!/bin/bash\n{body}\n")
            file.chmod(0o755)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA4", "XLA", "SLURM", "JAX"))}
    return keep | {"PATH": f"{folder}:{os.environ['PATH']}", "SEEN": str(folder / "seen"), "SLURM_JOB_ID": "7",
                   "SLURM_JOB_NODELIST": "n[1-2]", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0",
                   "XLA_FLAGS": "--of_the_host", "A_TOKEN": "secret"}  # fmt: skip


def kubernetes(text: str, env: dict[str, str]) -> str:
    """As the kubelet expands $(NAME) in a command's words: unknown ones stay, $$ is a dollar."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), text)


def run(target: str, text: str, folder: Path) -> None:
    """Run what a host would, on this one, with stubs for all clients."""
    env = environment(folder)
    (folder / "hosts").write_text("# hosts\n\nn1 slots=2\nn2 slots=2\n")
    command = ["bash", str(folder / "file")]
    (folder / "file").write_text(text)
    if target == "jobset":
        pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
        for variable in pod["env"]:
            env[variable["name"]] = variable.get("value", "0")
        env["JOB_COMPLETION_INDEX"] = "0"
        command = [kubernetes(word, env) for word in (*pod["command"], *pod["args"])]
    elif target == "sky":
        command = ["bash", "-c", yaml.safe_load(text)["run"]]
    elif target == "xpk":
        (folder / "xpk").write_text('#!/bin/bash\nfor w; do last=$w; done\nexec bash -c "$last"\n')
        (folder / "xpk").chmod(0o755)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.stdout, done.stderr, text)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(jobs())
def test_words_arrive_as_they_are(tmp_path: Path, job: tuple[str, dict[str, Any]]):
    """Whatever the words and values hold, the command gets them, its environment has them, and nothing else happens."""
    target, spec = job[0], JobSpec(**job[1])
    made = render(target, spec)
    if target == "ray":
        tree = ast.parse(made.text)
        literal = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "JOB")
        plan = ast.literal_eval(literal)
        assert tuple(plan["argv"]) == spec.argv and dict(spec.env).items() <= plan["env"].items()
        assert len(tree.body) == 12
        return
    run(target, made.text, tmp_path)
    seen = (tmp_path / "seen").read_bytes().split(b"\0")[:-1]
    assert [word.decode() for word in seen] == list(spec.argv)
    pairs = (pair.decode().split("=", 1) for pair in (tmp_path / "seen.env").read_bytes().split(b"\0")[:-1])
    env = {name: value for name, value in pairs if not name.startswith("BASH_FUNC")}
    assert dict(spec.env).items() <= env.items() and spec.planned.items() <= env.items()
    flags = env["XLA_FLAGS"].split()
    assert flags[-1] == "--of_the_host" and (GPU_FLAGS in flags) == (spec.platform == "gpu")
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("change, says", [
    (dict(name="Run 1"),
     "--name 'Run 1' must be lower-case letters, digits and hyphens, at most 40, from a letter "
     "on; the nearest is 'run-1'"),
    (dict(folder="/x; rm"), "--out '/x; rm' must be of letters"),
    (dict(queue="a b"), "--queue 'a b' must be of letters"),
    (dict(folder="-x"), "--out '-x' must not begin with a hyphen"), (dict(folder=""), "a job needs the run's folder"),
    (dict(env=(("HF_TOKEN", "x"),)), "--env HF_TOKEN would write a secret into a file: give --secret HF_TOKEN"),
    (dict(env=(("A B", "x"),)), "--env 'A B' is not the name of a variable"), (dict(port=80), "--port lies between"),
    (dict(grace=1), "--grace lies between 30"), (dict(argv=("a\0",)), "holds a NUL"),
    (dict(hosts=0), "--hosts must be at least 1"),
])  # fmt: skip
def test_bad_jobs_are_refused(change: dict, says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        JobSpec(**dict(name="a", argv=("train",), folder="/x") | change)


@pytest.mark.parametrize("line, says", [
    ("slrm pretrain:tiny",
     "no target 'slrm'; the nearest is 'slurm' (all: local, slurm, jobset, sky, ray, tpu-vm, mpi, xpk)"),
    ("slurm pretrain:tiny --topology v5p:4x4x4 --out /x --train.batch 64",
     "slurm runs on GPUs and CPUs, not on v5p:4x4x4"),
    ("jobset pretrain:tiny --image i --topology v5p:4x4x4", "every host of jobset must see the run's folder"),
    ("jobset pretrain:tiny --image i --topology v5p:4x4x4 --hosts 3 --out gs://b/x",
     "v5p:4x4x4 is 16 hosts of 4 chips, not --hosts 3"),
    ("slurm pretrain:tiny --hosts 3 --out /x",
     "train.batch (8) must be a multiple of replica x fsdp x expert x scout's microbatches = 3"),
    ("mpi pretrain:tiny --hosts 2 --out /x", "mpi on 2 hosts needs --hostfile FILE"),
    ("tpu-vm pretrain:tiny --topology tpu7x:4x4x4 --zone z --out gs://b/x", "tpu-vm runs on slices of v5e, v5p, v6e"),
    ("slurm pretrain:tiny --out /x --env A", "--env takes NAME=VALUE, not 'A'"),
    ("slurm pretrain:tiny --out /x --train.stepz 3", "no option or field --train.stepz; the nearest is --train.steps"),
])  # fmt: skip
def test_wrong_launches_are_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]):
    assert says in error(f"launch {line} --dry-run", capsys)


def test_a_missing_client_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    says = error("launch slurm pretrain:tiny --out /x", capsys)
    assert "sbatch is not on this machine's path: install SLURM's client commands" in says
    assert not list(tmp_path.iterdir())


def test_the_client_gets_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "kubectl").write_text('#!/bin/sh\necho kubectl "$@"\nexit 3\n')
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    line = "launch jobset pretrain:tiny --topology v6e:2x4 --out gs://b/x --image i"
    assert cli.main(line.split()) == 3
    printed = capfd.readouterr()
    assert "kubectl create -f launches/x.yaml" in printed.out and "resume: kubectl delete jobset x" in printed.err
    assert yaml.safe_load((tmp_path / "launches" / "x.yaml").read_text())["kind"] == "JobSet"


@pytest.mark.parametrize("topology, hosts", [("v5p:4x4x4", 16), ("v5p:4x8x8", 64), ("v6e:4x4", 4), ("v6e:16x16", 64),
                                             ("v5e:4x4", 4), ("tpu7x:4x4x4", 16)])  # fmt: skip
def test_a_jobset_is_as_xpk_makes_it(topology: str, hosts: int, tmp_path: Path):
    """xpk's own manifest of the line that is rendered for it, field by field."""
    xpk = shutil.which("xpk") or pytest.skip("xpk is not installed: pip install xpk, into an environment of its own")
    chips = 8 if topology.startswith("tpu7x") else 4
    spec = JobSpec("a", ("train", "pretrain:tiny"), "gs://b/x", topology, hosts, devices=chips, image="i", cluster="c",
                   project="p", zone="us-east5-a", grace=600, restarts=3)  # fmt: skip
    (tmp_path / "xpk").write_text(
        f'#!/bin/sh\nexec {xpk} "$@" --dry-run --skip-validation --output-manifest-file m.yaml\n'
    )
    (tmp_path / "xpk").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    made = render("xpk", spec).text
    done = subprocess.run(["bash", "-c", made], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]

    def fields(text: str) -> dict[str, Any]:
        whole = yaml.safe_load(text)
        jobs = whole["spec"]["replicatedJobs"][0]
        job = jobs["template"]["spec"]
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        rule = job["podFailurePolicy"]["rules"][-1]
        return {
            "apiVersion": whole["apiVersion"], "kind": whole["kind"], "name": whole["metadata"]["name"],
            "topology": whole["metadata"]["annotations"], "restarts": whole["spec"]["failurePolicy"]["maxRestarts"],
            "policy": whole["spec"]["failurePolicy"]["rules"][-1] | {"name": ""}, "slices": jobs["replicas"],
            "parallelism": job["parallelism"], "completions": job["completions"], "backoff": job["backoffLimit"],
            "rule": (rule["action"], rule["onExitCodes"]["operator"]), "never": pod["restartPolicy"],
            "again": {70, 75, 134, 137, 139, 143} <= {*rule["onExitCodes"]["values"]},
            "nodes": {n: v for n, v in pod["nodeSelector"].items() if "placement-policy" not in n},
            "network": pod["hostNetwork"], "dns": pod["dnsPolicy"], "grace": pod["terminationGracePeriodSeconds"],
            "chips": container["resources"]["limits"], "image": container["image"],
            "tolerations": [(t["key"], t["operator"]) for t in pod["tolerations"]],
            "shm": [v["emptyDir"] for v in pod["volumes"]],
            "mount": [m["mountPath"] for m in container["volumeMounts"]],
        }  # fmt: skip

    theirs, ours = fields((tmp_path / "m.yaml").read_text()), fields(render("jobset", spec).text)
    assert ours == theirs


# --- Validators, where they are installed


def golden(*starts: str) -> list[Path]:
    found = [file for file in sorted(GOLDEN.glob("*.txt")) if file.stem.startswith(starts)]
    assert found
    return found


@pytest.mark.parametrize("file", golden("local", "slurm", "mpi", "tpu-vm", "xpk"), ids=lambda f: f.stem)
def test_shellcheck(file: Path):
    checker = shutil.which("shellcheck") or pytest.skip("shellcheck is not installed (extra launch-test)")
    done = subprocess.run(
        [checker, "--severity=style", "--exclude=SC1090,SC2016,SC2317,SC2329", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_sbatch(tmp_path: Path):
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no SLURM here (make test-slurm)")
    done = subprocess.run(["sbatch", "--test-only", GOLDEN / "slurm-cpu.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(("jobset",)))
def test_jobsets_are_valid(job: tuple[str, dict[str, Any]]):
    """Each template as a batch/v1 Job, unknown keys refused; the whole by JobSet's own models."""
    validator = pytest.importorskip("kubernetes_validate")
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = yaml.safe_load(render("jobset", JobSpec(**job[1] | {"name": "a"})).text)
    for replicated in manifest["spec"]["replicatedJobs"]:
        template = replicated["template"]
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **template}
        validator.validate(whole, validator.latest_version(), strict=True)
    parsed = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert json.loads(parsed.to_json())["spec"]["failurePolicy"] == manifest["spec"]["failurePolicy"]


def test_the_validator_sees_a_wrong_key():
    validator = pytest.importorskip("kubernetes_validate")
    job = yaml.safe_load((GOLDEN / "jobset.txt").read_text())["spec"]["replicatedJobs"][0]["template"]
    job["spec"]["paralelism"] = job["spec"].pop("parallelism")
    with pytest.raises(Exception, match="paralelism"):
        validator.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **job},
                           validator.latest_version(), strict=True)  # fmt: skip


@pytest.mark.parametrize("file", golden("sky"), ids=lambda f: f.stem)
def test_sky_reads_its_task(file: Path):
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml_config(yaml.safe_load(file.read_text()))
    assert task.num_nodes == yaml.safe_load(file.read_text())["num_nodes"]


def test_flags_are_known_to_xla():
    """XLA ends a process that meets a flag which it does not know."""
    code = "import jax; jax.devices()"
    for flags in (GPU_FLAGS, "--xla_force_host_platform_device_count=2"):
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
