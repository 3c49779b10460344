"""Several processes: the same run however many they are, resumed on other numbers of them, killed, and failing. Run with: pytest"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import faults
import fsdp
import models
import train

HERE = Path(__file__).resolve().parent
PLANE = ["--batch-size", 8, "--iterations", 10, "--save-every", 5]  # beside faults.RUN
EMOJI = ["--model", data.EMOJI_TEACHER, "--variant", "dmd2", "--batch-size", 4, "--iterations", 10, "--fake-updates", 2, "--save-every", 5]
SHARED = {"one": dict(processes=1), "two": dict(processes=2), "four": dict(processes=4), "none": dict(processes=2), "hybrid": dict(processes=4, nodes=2)}
LORA = ["--lora", 4, "--gan-weight", 0, "--learning-rate", 1e-3] if importlib.util.find_spec("peft") else []
VARIANTS = {"dmd": ["--variant", "dmd", "--pairs", "PAIRS"], "dmd2": ["--variant", "dmd2"], "fdistill": [],
            "decoupled": ["--variant", "decoupled", "--mean-variance-weight", "0.1"]}


# ---------------------------------------------------------------------------------------------------- the runs that the tests look at

def keep_what_each_process_holds(out):
    """Before a run begins: have each process write its own part of everything when it ends, and a sample of the averaged student."""
    loop = train.loop

    def loop_and_keep(networks, *rest):
        loop(networks, *rest)
        noise = torch.randn(4, 8, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            x = models.rollout(networks.averaged_student, noise, networks.model.encode(["0", "1", "2", "3"] * 2), networks.timesteps)
        torch.save({"x": x}, out / f"sample-{fsdp.rank()}.pt")
        own = {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in networks.tensors().items()}
        torch.save(own, out / f"process-{fsdp.rank()}.pt")

    train.loop = loop_and_keep


def note_dtypes(out):
    """Of a block's weight while it runs, of its gradient and of its optimizer state."""
    real, seen = train.adamw, {}

    def watch(module, learning_rate):
        optimizer = real(module, learning_rate)
        convolution = module.get_submodule("denoiser.network.mid_block.resnets.0.conv1") if hasattr(module, "denoiser") else None
        if convolution:
            convolution.register_forward_pre_hook(lambda module, inputs: seen.update(running=str(module.weight.dtype)))
            step = optimizer.step

            def note_and_step():
                seen.update(gradient=str(convolution.weight.grad.dtype), master=str(convolution.weight.dtype),
                            moment=str(optimizer.state[convolution.weight]["exp_avg"].dtype))
                (out / f"dtypes-{os.environ['RANK']}.json").write_text(json.dumps(seen))
                step()

            optimizer.step = note_and_step
        return optimizer

    train.adamw = watch


def signal_at_the_first_picture():
    """Before a run begins: let its first process get a SIGTERM while it draws the picture that comes before the first iteration."""
    draw = faults.gmm.Gallery.draw
    faults.gmm.Gallery.draw = lambda gallery, iteration: (fsdp.first() and os.kill(os.getpid(), signal.SIGTERM), draw(gallery, iteration))


def kill_when_saved(out, iteration, flags, **launch):
    """kill -9 to all processes as soon as that checkpoint is there."""
    pids = faults.fork_train([*faults.RUN, *flags, "--out", out], out.parent / f"{out.name}.log", **launch)
    while not (out / "checkpoints" / f"{iteration:06d}").is_dir():
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    faults.wait_for(pids)


def make_runs(work):
    """All in one process that forks, which is quick; the tests then only look."""
    def run(name, *flags, **launch):
        status, printed = faults.train_tiny(work / name, "--out", work / name, *flags, **launch)
        assert status == 0, printed

    run("plain", *PLANE, before=lambda: keep_what_each_process_holds(work / "plain"))
    for name, launch in SHARED.items():
        run(name, *PLANE, "--shard", name if name in ("none", "hybrid") else "full", before=lambda: keep_what_each_process_holds(work / name), **launch)
    (work / "prompts.txt").write_text("red apple\n")  # one, since pictures of a run cost more here than its iterations
    emoji = [*EMOJI, "--prompts", work / "prompts.txt"]
    run("emoji-plain", *emoji)
    run("emoji-two", *emoji, processes=2)
    run("emoji-memory", *emoji, "--micro-batch", 1, "--activation-checkpointing", processes=2)
    run("six", "--iterations", 6, processes=2)
    run("parts", *PLANE, "--micro-batch", 3, processes=2)  # a share of four, in three and one
    if LORA:
        for name, processes in (("emoji-lora-one", 0), ("emoji-lora-two", 2)):
            run(name, *emoji, *LORA, processes=processes)
        kill_when_saved(work / "emoji-lora-killed", 5, [*emoji, *LORA], processes=2)
        status, printed = faults.train_tiny(work / "emoji-lora-killed", "--resume", work / "emoji-lora-killed", processes=2)
        assert status == 0, printed
    run("emoji-bfloat16", *emoji, "--iterations", 1, "--dtype", "bfloat16", "--guidance", 1, "--student-steps", 1, processes=2,
        before=lambda: note_dtypes(work / "emoji-bfloat16"))

    data.make_pairs(work / "pairs", dict(model="gmm", prompts=None, count=64, steps=4, guidance=3.0, seed=0))
    for name, flags in VARIANTS.items():
        flags = [*PLANE, *(str(work / "pairs") if flag == "PAIRS" else flag for flag in flags)]
        for processes in (0, 2):
            whole, killed = work / f"{name}-{processes}-whole", work / f"{name}-{processes}-killed"
            run(whole.name, *flags, processes=processes)
            kill_when_saved(killed, 5, flags, processes=processes)
            shutil.copytree(killed, work / f"{killed.name}-copy")
            status, printed = faults.train_tiny(killed, "--resume", killed, processes=processes)
            assert status == 0 and "going on from" in printed, printed
    for before, after in ((2, 4), (2, 0), (0, 2)):
        out = work / f"from-{before}-on-{after}"
        shutil.copytree(work / f"fdistill-{before}-killed-copy", out)
        status, printed = faults.train_tiny(out, "--resume", out, processes=after)
        assert status == 0, printed


    for processes in (0, 2):
        out = work / f"signal-{processes}"
        done = faults.train_tiny(out, "--out", out, *PLANE, processes=processes, before=signal_at_the_first_picture)
        (work / f"signal-{processes}.json").write_text(json.dumps(done))
    unequal = lambda: os.environ.update(LOCAL_WORLD_SIZE="1" if os.environ["RANK"] == "2" else "2", LOCAL_RANK=str(int(os.environ["RANK"]) % 2))
    done = faults.train_tiny(work / "unequal", "--out", work / "unequal", "--shard", "hybrid", processes=3, before=unequal)
    (work / "unequal.json").write_text(json.dumps(done))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    work = tmp_path_factory.mktemp("runs")
    done = subprocess.run([sys.executable, __file__, work], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    return work


def row_of(run):
    return {name: value for name, value in json.loads((run / "metrics.jsonl").read_text()).items() if name != "seconds"}


def apart(run, reference, start):
    """How far two runs' students and fake scores ended from one another, in units of how far they moved."""
    a, b, origin = (faults.state_of(folder) for folder in (run, reference, start))
    names = [name for name in b if name.startswith(("student.", "fake_score.")) and b[name].is_floating_point()]
    norm = lambda x, y: sum((x[name] - y[name]).square().sum() for name in names).sqrt()
    return (norm(a, b) / norm(b, origin)).item()


# ---------------------------------------------------------------------------------------------------- one run, however many processes

@pytest.mark.parametrize("name", SHARED)
def test_any_number_of_processes_follows_the_same_losses(runs, name):
    assert row_of(runs / name) == pytest.approx(row_of(runs / "plain"), rel=1e-4)
    first = runs / "plain" / "checkpoints" / "000005"
    assert apart(runs / name, runs / "plain", first) < 1e-3


@pytest.mark.parametrize("name", SHARED)
def test_the_averaged_student_that_is_sampled_is_the_one_that_has_moved(runs, name):
    """FSDP must not go on with parameters that it gathered before the average moved on."""
    x, expected = (torch.load(runs / folder / "sample-0.pt", weights_only=True)["x"] for folder in (name, "plain"))
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_the_embedded_teacher_on_two_processes(runs):
    assert row_of(runs / "emoji-two") == pytest.approx(row_of(runs / "emoji-plain"), rel=1e-3)
    assert apart(runs / "emoji-two", runs / "emoji-plain", runs / "emoji-plain" / "checkpoints" / "000005") < 1e-2


def test_accumulated_gradients_and_activation_checkpointing_on_two_processes(runs):
    assert row_of(runs / "parts") == pytest.approx(row_of(runs / "plain"), rel=1e-4)
    assert apart(runs / "parts", runs / "plain", runs / "plain" / "checkpoints" / "000005") < 1e-3
    assert row_of(runs / "emoji-memory") == pytest.approx(row_of(runs / "emoji-plain"), rel=1e-3)
    assert apart(runs / "emoji-memory", runs / "emoji-plain", runs / "emoji-plain" / "checkpoints" / "000005") < 1e-2


@pytest.mark.skipif(not LORA, reason="needs peft")
def test_a_lora_on_two_processes(runs):
    one, two, killed = (runs / f"emoji-lora-{name}" for name in ("one", "two", "killed"))
    assert row_of(two) == pytest.approx(row_of(one), rel=1e-3) and apart(two, one, one / "checkpoints" / "000005") < 1e-2
    a, b = faults.state_of(killed), faults.state_of(two)
    assert row_of(killed) == row_of(two) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all("lora_" in name or name.endswith("ratio_means") for name in a)


@pytest.mark.parametrize("name, alike", [("none", [(0, 1)]), ("hybrid", [(0, 2), (1, 3)])])
def test_replicas_never_diverge(runs, name, alike):
    for a, b in alike:
        mine, other = (torch.load(runs / name / f"process-{process}.pt", weights_only=True) for process in (a, b))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("name, parts", [("two", 2), ("four", 4), ("hybrid", 2), ("none", 1)])
def test_each_process_holds_its_part_of_parameters_and_optimizer_state(runs, name, parts):
    count = lambda tensors: sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith((".step", "ratio_means")))
    whole = count(faults.state_of(runs / name))
    held = [count(torch.load(runs / name / f"process-{process}.pt", weights_only=True)) for process in range(SHARED[name]["processes"])]
    assert max(held) < 1.1 * whole / parts and sum(held) == whole * len(held) / parts


def test_the_running_means_of_the_ratio_are_the_same_on_every_process(runs):
    means = [torch.load(runs / "four" / f"process-{process}.pt", weights_only=True)["fake_score.ratio_means"] for process in range(4)]
    assert all(torch.equal(means[0], other) for other in means) and (means[0] != 1).any()


def test_bfloat16_is_gathered_and_float32_kept(runs):
    for process in range(2):
        seen = json.loads((runs / "emoji-bfloat16" / f"dtypes-{process}.json").read_text())
        assert seen == {"running": "torch.bfloat16", "gradient": "torch.float32", "master": "torch.float32", "moment": "torch.float32"}


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_draws_of_a_sample_do_not_depend_on_who_makes_them(processes):
    def numbers(share):
        draws = data.Draws(3, 14, 8, share)
        return [draws.uniform(2), draws.normal(3, 5), draws.integers(20, 980)], [draws.below(4), draws.below(1000)]

    own, shared = numbers(range(8))
    parts = [numbers(range(i, i + 8 // processes)) for i in range(0, 8, 8 // processes)]
    assert all(torch.equal(torch.cat(pieces), whole) for whole, *pieces in zip(own, *(part[0] for part in parts)))
    assert all(part[1] == shared for part in parts)


def test_draws_are_uniform_and_normal_and_differ_by_seed_and_index():
    draws = data.Draws(0, 0, 100_000)
    normal, uniform, integers = draws.normal(2), draws.uniform(), draws.integers(3, 7)
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01 and abs((normal ** 4).mean() - 3) < 0.1
    assert abs(torch.corrcoef(normal.T)[0, 1]) < 0.01 and abs(torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1]) < 0.01
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.01
    assert (torch.bincount(integers)[3:7] / 100_000 - 0.25).abs().max() < 0.01 and integers.min() == 3 and integers.max() == 6
    first, *others = (data.Draws(seed, index, 4).uniform() for seed, index in ((0, 0), (1, 0), (0, 1)))
    assert all(not torch.equal(first, other) for other in others)


# ---------------------------------------------------------------------------------------------------- killed and resumed

@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_five_iterations_a_kill_and_five_more_are_ten_bit_for_bit(runs, variant, processes):
    killed, whole = runs / f"{variant}-{processes}-killed", runs / f"{variant}-{processes}-whole"
    assert faults.same_state(killed, whole)
    assert row_of(killed) == row_of(whole)  # a row of means over ten iterations, of which five were before the kill


@pytest.mark.parametrize("before, after", [(2, 4), (2, 0), (0, 2)])
def test_resumed_on_another_number_of_processes_it_is_the_same_to_rounding(runs, before, after):
    whole = runs / "fdistill-2-whole"
    assert apart(runs / f"from-{before}-on-{after}", whole, whole / "checkpoints" / "000005") < 1e-3


def test_kill_9_at_random_moments(tmp_path):
    """faults.py, short."""
    done = subprocess.run([sys.executable, HERE / "faults.py", "kill", "disk", "--kills", "3", "--work", tmp_path], text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count("| yes |\n") == 4, done.stdout + done.stderr


def test_damaged_checkpoints(tmp_path):
    done = subprocess.run([sys.executable, HERE / "faults.py", "damage", "--work", tmp_path], text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count("| yes | status 2: train.py: the checkpoint") == 9, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- torchrun

@pytest.mark.parametrize("kind, status, cause", [("nan", 1, "the gradient of the fake score is not finite"), ("exception", 1, "process 1 failed: planted in one process"),
                                                 ("hang", 1, "it has lost another process")])
def test_one_process_that_fails_stops_all_and_says_why_once(tmp_path, kind, status, cause):
    (got, printed), start = faults.torchrun(HERE / "faults.py", "planted", kind, *faults.RUN, "--iterations", 6, "--timeout", 20, "--out", tmp_path / "run"), time.time()
    assert got == status, printed
    assert cause in re.findall(r"traceback : (.*)", printed)[-1], printed
    before_summary = printed.split("=====")[0]
    assert before_summary.count(cause) == 1, printed


def test_torchrun_s_restart_goes_on_from_the_last_checkpoint(runs, tmp_path):
    out = tmp_path / "run"
    status, printed = faults.torchrun(HERE / "faults.py", "planted", "kill", *faults.RUN, "--iterations", 6, "--out", out, restarts=1)
    assert status == 0, printed
    assert f"going on from {out}/checkpoints/" in printed
    assert faults.same_state(out, runs / "six")


def test_a_signal_to_torchrun_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "train.py", *faults.RUN, "--iterations", 1000, "--save-every", 1000]
    with subprocess.Popen([*map(str, command), "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        printed = launcher.communicate()[0]
    done = int(re.search(r"interrupted after (\d+) of 1000 iterations; go on with --resume ", printed)[1])
    assert [int(folder.name) for folder in checkpoint.complete_checkpoints(out)] == [done]


@pytest.mark.parametrize("processes", [0, 2])
def test_a_signal_before_the_first_iteration_saves_too(runs, processes):
    status, printed = json.loads((runs / f"signal-{processes}.json").read_text())
    assert status == 128 + signal.SIGTERM and "interrupted after 1 of 10 iterations" in printed and "once more stops at once" in printed
    assert [folder.name for folder in checkpoint.complete_checkpoints(runs / f"signal-{processes}")] == ["000001"]


def test_hybrid_on_unequal_nodes_is_refused_by_all(runs):
    status, printed = json.loads((runs / "unequal.json").read_text())
    assert status == 2 and printed.count("needs as many processes on each node; there are 1 and 2") == 3, printed  # no launcher here ends the others


def test_two_nodes(runs, tmp_path):
    """Two launchers that find one another, two processes each; the nodes are this machine twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    flags = [HERE / "train.py", *faults.RUN, *PLANE, "--shard", "hybrid", "--out", tmp_path / "run"]
    nodes = [subprocess.Popen([*command, f"--node_rank={node}", *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) for node in range(2)]
    printed = [node.communicate()[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), printed
    assert faults.same_state(tmp_path / "run", runs / "hybrid")


def test_a_batch_that_cannot_be_shared_is_one_line_from_one_process():
    status, printed = faults.torchrun(HERE / "train.py", "--model", "gmm", "--batch-size", 7)
    assert status == 1 and printed.split("=====")[0].count("--batch-size 7 cannot be shared by 2 processes") == 1, printed


def test_benchmark_under_torchrun():
    status, printed = faults.torchrun(HERE / "train.py", "--model", "gmm", "--benchmark", 2)
    assert status == 0 and re.search(r"2 processes, --shard full: [\d.]+ samples a second each, [\d.]+ s an iteration in communication", printed), printed
    assert re.search(r"one process alone, unsharded, with 16 samples: [\d.]+ s an iteration, so the efficiency is", printed), printed


if __name__ == "__main__":
    torch.set_num_threads(1)
    faults.gmm.Model("gmm"), models.load_model(data.EMOJI_TEACHER)  # which the forked processes then need not fit and import
    make_runs(Path(sys.argv[1]))
