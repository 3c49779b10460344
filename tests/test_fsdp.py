"""Several processes: the same run however many they are, resumed on other numbers, and failing."""

import json

import pytest
import torch

import data
import sample
import train
from lab import faults, plane
from tests.tiny import call

FLAGS = "--variant fdistill --gan-weight 0.05 --batch-size 8 --fake-updates 2 --save-every 2"


def launch(out, flags, processes=2, shard="full", nodes=1):
    """A run of the plane on forked ranks."""
    plane.PlaneModel("gmm")  # fitted once, before the fork
    words = [*flags.split(), "--shard", shard]
    ranks = {"processes": processes, "nodes": nodes}
    statuses, printed = faults.on_ranks(plane.main, f"{out}.log", *words, **ranks)
    assert statuses == [0] * max(processes, 1), printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    launch(out, f"{FLAGS} --iterations 6 --out {out}", processes=0)
    return out


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same(run, reference):
    for own, theirs in zip(rows(run), rows(reference), strict=True):
        for name in own.keys() - {"seconds"}:
            assert own[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    check_same_state(run, reference)


def check_same_state(run, reference):
    own, theirs = faults.state_of(run), faults.state_of(reference)
    assert own.keys() == theirs.keys()
    for name in own:
        torch.testing.assert_close(own[name], theirs[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "processes, shard, nodes",
    [
        (2, "full", 1),
        (2, "none", 1),
        pytest.param(4, "full", 1, marks=pytest.mark.slow),
        pytest.param(4, "hybrid", 2, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_makes_the_same_run(processes, shard, nodes, alone, tmp_path):
    out = tmp_path / "run"
    flags = f"{FLAGS} --iterations 6 --out {out}"
    launch(out, flags, processes=processes, shard=shard, nodes=nodes)
    check_same(out, alone)


@pytest.mark.parametrize("before, after", [(2, 0), (0, 2)])
def test_a_run_resumes_on_another_number_of_ranks(before, after, alone, tmp_path):
    out = tmp_path / "run"
    launch(out, f"{FLAGS} --iterations 4 --out {out}", processes=before)
    launch(out, f"--resume {out} --iterations 6", processes=after)
    check_same_state(out, alone)


def test_draws_of_a_sample_do_not_depend_on_the_rank_that_makes_them():
    whole = data.Draws(1, 2, 8)
    parts = [data.Draws(1, 2, 8, range(i, i + 2)) for i in range(0, 8, 2)]
    assert len({draws.below(100) for draws in (whole, *parts)}) == 1
    assert torch.equal(whole.normal(3), torch.cat([draws.normal(3) for draws in parts]))
    u = data.Draws(0, 0, 100_000)
    x = u.normal()
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_ranks_train_on_the_embedded_teacher(dtype, tmp_path):
    """In micro-batches; the student that two ranks wrote is drawn by one process."""
    out = tmp_path / "run"
    flags = f"--iterations 2 --batch-size 4 --micro-batch 1 --gan-weight 0 --dtype {dtype}"
    words = f"{flags} --out {out}".split()
    statuses, printed = faults.on_ranks(train.main, tmp_path / "log", *words)
    assert statuses == [0, 0], printed
    flags = f"--student {out} --prompts cat --teacher-steps 2 --out {tmp_path}/grid.png"
    call(sample, flags)


def test_a_batch_that_cannot_be_shared_is_said_once(tmp_path):
    status, printed = faults.torchrun("train.py", "--batch-size", 5, "--out", tmp_path / "run")
    assert status == 1
    assert printed.count("train.py: --batch-size 5 is no multiple of the 2 ranks") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind, restarts", [("nan", 0), ("exception", 0), ("kill", 1)])
def test_one_rank_that_fails_stops_all_or_all_begin_again(kind, restarts, tmp_path):
    """The cause is named; torchrun's restart goes on from the last checkpoint."""
    (row,) = faults.rank(tmp_path, [(kind, restarts)])
    assert "NO" not in row
    assert not restarts or row[4] != "went on from 0"
