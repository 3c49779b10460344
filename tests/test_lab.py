"""The laboratory: the plane is exact, every claim runs, runs are broken."""

import json
import re

import pytest
import torch

import train
from lab import claims, faults, health, plane
from lab.trials import ROOT


def test_the_plane_s_denoiser_is_the_score_of_its_density():
    mixture, schedule = plane.plane(), plane.sd_schedule()
    label = torch.arange(plane.LABELS + 1).repeat(20)
    x_t = torch.randn(len(label), 2, dtype=torch.float64, requires_grad=True)
    for t in (100, 500, 900):
        alpha, sigma = schedule.alpha[t].double(), schedule.sigma[t].double()
        alpha, sigma = alpha.expand(len(label), 1), sigma.expand(len(label), 1)
        density = mixture.log_density(x_t, alpha, sigma, label).sum()
        (score,) = torch.autograd.grad(density, x_t)
        x0 = mixture.x0(x_t, alpha, sigma, label)
        torch.testing.assert_close((alpha * x0 - x_t) / sigma**2, score, atol=1e-5, rtol=1e-4)


def test_exact_samples_measure_well_and_wrong_ones_do_not(plane_model):
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(4096) % plane.LABELS
    target, again = (plane_model.target(label, 1.0, generator) for _ in range(2))
    good = plane.measure(plane_model.mixture, again, label, target)
    bad = plane.measure(plane_model.mixture, torch.zeros_like(again), label, target)
    assert good["modes"] == 1 and good["near"] > 0.95 and good["kl"] < 0.1
    assert bad["near"] < 0.1 and bad["kl"] > 1 and bad["sliced"] > 5 * good["sliced"]


def test_verdicts_say_the_difference_and_how_many_seeds_would_see_one_that_matters():
    rows = {
        "a": [{"kl": 1.0}, {"kl": 1.2}, {"kl": 1.1}],
        "b": [{"kl": 2.0}, {"kl": 2.1}, {"kl": 2.2}],
        "c": [{"kl": 0.1}, {"kl": 3.0}, {"kl": 1.5}],
    }
    found = claims.verdict("kl: a < b", rows)
    assert found.word == "yes" and found.mean == pytest.approx(-1.0)
    assert found.half == pytest.approx(4.30 * 0.1 / 3**0.5, rel=0.01)  # t of two degrees of freedom
    assert claims.verdict("kl: b < a", rows).word == "opposite"
    unresolved = claims.verdict("kl: a < c", rows)
    assert unresolved.word == "not resolved" and unresolved.seeds > 50
    for claim in claims.CLAIMS:
        every = {name: {} for name in (*claim.arms, claims.UNTRAINED)}
        for expectation in claim.expected:
            claims.compared(expectation, {name: [row] for name, row in every.items()})


def test_every_arm_of_every_claim_has_flags_that_train_takes(tmp_path):
    for claim in claims.CLAIMS:
        for name, trial in claim.trials().items():
            for rate in claims.WORLDS[trial.world].learning_rates:
                words = trial.arguments(tmp_path, rate, 0)
                args = train.parse_arguments([*map(str, words), "--out", str(tmp_path / "run")])
                assert args.learning_rate == float(rate), (claim.number, name)


# Claim 11 also measures the teacher's mean and variance; 3 makes pairs, 8 measures density ratios,
# 22 tells the fake score the student's step.
@pytest.mark.parametrize(
    "world, number",
    [
        ("plane", 11),
        pytest.param("plane", 3, marks=pytest.mark.slow),
        pytest.param("plane", 8, marks=pytest.mark.slow),
        pytest.param("scenes", 22, marks=pytest.mark.slow),
    ],
)
def test_a_claim_runs(world, number, tmp_path):
    flags = ["--seeds", "1", "--iterations", "2", "--jobs", "1", "--out", str(tmp_path)]
    claims.main([*flags, "--world", world, "--claim", str(number)])
    (table,) = tmp_path.rglob(f"{world}.md")
    assert f"### Claim {number}:" in table.read_text()


def test_a_run_is_watched(tmp_path):
    health.run(tmp_path, "DMD2, one step", "--student-steps 1 --iterations 2 --batch-size 2", 0)
    result = json.loads(health.file_of(tmp_path, "DMD2, one step", 0).read_text())
    assert [moment["iteration"] for moment in result["moments"]] == [0, 2]
    assert all(moment["frechet"] > 0 for moment in result["moments"])
    (line,) = health.table({"one": result})[2:]
    assert line.startswith("| one | ")
    health.draw_moments(tmp_path, ["DMD2, one step"])
    assert (tmp_path / "health.png").is_file()


# Which spoilt runs of docs/health.md no warning tells from healthy ones.
UNSEEN = {
    "noised real data",
    "a fake score unlike the teacher",
}


def test_healthy_runs_never_warn_and_most_spoilt_ones_do():
    results = json.loads(health.RESULTS.read_text())
    warned = {}
    for name, result in results.items():
        warned.setdefault(name.rsplit(",", 1)[0], []).append(health.first_warning(result))
    page = (ROOT / "docs" / "health.md").read_text()
    for name, (first, *_) in warned.items():
        cell = f"{first[0]}: {first[1]}" if first else "-"
        assert re.search(rf"^\| {re.escape(name)} \|.* \| {cell} \|$", page, re.MULTILINE), name
    for name in health.HEALTHY:
        assert warned.pop(name) == [None] * health.SEEDS, name
    assert {name for name, (warning,) in warned.items() if warning is None} == UNSEEN
    assert warned.keys() == health.SPOILT.keys()


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    plane.PlaneModel("gmm")
    for rows in (faults.kill(tmp_path, kills=4), faults.damage(tmp_path), faults.disk(tmp_path)):
        assert rows and not any("NO" in row for row in rows), rows
