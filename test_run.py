"""train.py, sample.py and eval.py as a user runs them, tiny, and what they write. Run with: pytest"""

import json
import math
import os
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import checkpoint
import data
import faults
import gmm
import laboratory
import models
import sample
import train

HERE = Path(__file__).resolve().parent
TINY = ["--gan-weight", "0", "--batch-size", "4", "--fake-updates", "2", "--picture-every", "4", "--save-every", "2", "--warmup", "0"]


def run(script, *arguments):
    """Run one of our scripts in this process, with a command line of its own; returns the exit status."""
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
        return 0
    except SystemExit as exit:
        return exit.code
    finally:
        sys.argv = argv


def state(run):
    return faults.state_of(run)


def newest(run):
    """Iteration of its newest checkpoint."""
    return int(checkpoint.complete_checkpoints(run)[0].name)


def weights(folder):
    return UNet2DConditionModel.from_pretrained(folder).state_dict()


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four iterations that the tests read, and must not change."""
    out = tmp_path_factory.mktemp("runs") / "four"
    assert run("train.py", "--out", out, "--iterations", 4, *TINY) == 0
    return out


# ---------------------------------------------------------------------------------------------------- the run directory

def test_run_directory(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["batch_size"] == 4 and config["student_steps"] == 4 and config["guidance"] == sample.DEFAULT_GUIDANCE
    for name in ("curves.png", "pictures/000000.png", "pictures/000004.png"):
        Image.open(finished / name).verify()
    student, teacher = weights(finished / "student"), weights(data.EMOJI_TEACHER / "unet")
    assert not same_weights(student, {name: tensor.float() for name, tensor in teacher.items()})


def test_metrics_have_a_row_each_ten_iterations_with_losses_and_health(tmp_path):
    assert run("train.py", "--out", tmp_path / "run", "--iterations", 10, *TINY) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [10]
    assert {"fake_loss", "fake_grad_norm", "student_grad_norm", "dm", "ca", "std", "gap", "cosine", "seconds"} <= rows[0].keys()
    assert all(math.isfinite(value) for value in rows[0].values()) and 0.3 < rows[0]["std"] < 3


def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(finished, tmp_path):
    out = tmp_path / "run"
    assert run("train.py", "--out", out, "--iterations", 2, *TINY) == 0
    assert run("train.py", "--resume", out, "--iterations", 4) == 0  # the other flags are remembered
    resumed, undisturbed = state(out), state(finished)
    assert newest(out) == newest(finished) == 4 and same_weights(resumed, undisturbed)
    for part in ("student.", "averaged_student.", "fake_score.", "student_optimizer.", "fake_score_optimizer."):
        assert any(name.startswith(part) for name in resumed)


PLANE = ["--model", "gmm", "--batch-size", "8", "--fake-updates", "2", "--picture-every", "4", "--save-every", "2", "--warmup", "0"]


@pytest.fixture(scope="module")
def plane_pairs(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "plane"
    assert run("data.py", "pairs", "--model", "gmm", "--out", out, "--count", 300, "--steps", 4, "--guidance", 3) == 0
    return out


@pytest.fixture(scope="module")
def plane_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plane"
    assert run("train.py", "--out", out, "--iterations", 4, "--gan-weight", 0, *PLANE) == 0
    return out


@pytest.mark.parametrize("flags", [["--variant", "dmd", "--pairs", "PAIRS"], ["--variant", "dmd2"], ["--variant", "fdistill"],
                                   ["--variant", "decoupled", "--mean-variance-weight", "0.1"],
                                   ["--variant", "decoupled", "--gan-weight", "0.1", "--student-input", "data", "--student-steps", "2"],
                                   ["--variant", "fdistill", "--divergence", "jeffreys", "--schedule", "full", "--normaliser", "none"]],
                         ids=lambda flags: "-".join(flags[1::2]))
def test_every_variant_runs_and_resumes_bit_for_bit(flags, plane_pairs, tmp_path):
    flags = [str(plane_pairs) if flag == "PAIRS" else flag for flag in flags]
    assert run("train.py", "--out", tmp_path / "whole", "--iterations", 4, *PLANE, *flags) == 0
    assert run("train.py", "--out", tmp_path / "parts", "--iterations", 2, *PLANE, *flags) == 0
    assert run("train.py", "--resume", tmp_path / "parts", "--iterations", 4) == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert same_weights(whole, parts)
    assert ("fake_score_optimizer.head.layers.0.weight.exp_avg" in whole) == ("dmd" not in flags and (flags[1] != "decoupled" or "--gan-weight" in flags))
    assert (whole["fake_score.ratio_means"] != 1).any() == (flags[1] == "fdistill")


def test_dmd2_with_its_gan_on_the_embedded_teacher(tmp_path, capsys):
    flags = ["--batch-size", "4", "--fake-updates", "2", "--warmup", "0", "--iterations", 10]
    assert run("train.py", "--out", tmp_path / "run", *flags) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 <= row["logit_accuracy"] <= 1 and math.isfinite(row["student_grad_norm"])


def test_pairs_are_made_once_and_go_on_where_they_stopped(plane_pairs, tmp_path, capsys):
    shutil.copytree(plane_pairs, tmp_path / "pairs")
    before = (tmp_path / "pairs" / "00000.safetensors").stat().st_mtime_ns
    (tmp_path / "pairs" / "00001.safetensors").unlink()  # as if interrupted before it
    flags = ["--model", "gmm", "--out", tmp_path / "pairs", "--steps", 4, "--guidance", 3]
    assert run("data.py", "pairs", *flags, "--count", 300) == 0
    assert (tmp_path / "pairs" / "00000.safetensors").stat().st_mtime_ns == before
    for name in ("00000", "00001"):
        assert (tmp_path / "pairs" / f"{name}.safetensors").read_bytes() == (plane_pairs / f"{name}.safetensors").read_bytes()
    assert run("data.py", "pairs", *flags, "--count", 300, "--seed", 1) == 2
    assert "seed was 0, is 1" in capsys.readouterr().err


def test_recipe_of_the_plane_draws_samples_and_measures(tmp_path, capsys):
    assert run("train.py", f"@{HERE / 'recipes' / 'gmm.args'}", "--iterations", 50, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "pictures" / "000050.png").is_file()
    assert run("sample.py", "--student", tmp_path / "run", "--out", tmp_path / "points.png") == 0
    assert Image.open(tmp_path / "points.png").width > 3 * 250  # a panel a row
    assert run("eval.py", "--student", tmp_path / "run", "--out", tmp_path / "numbers") == 0
    rows = {row["label"]: row for row in json.loads((tmp_path / "numbers" / "metrics.json").read_text())["rows"]}
    assert rows["target"]["kl"]["value"] < 0.1 < rows["student, 1 step"]["kl"]["value"]


def test_laboratory_runs_a_claim_keeps_its_runs_and_writes_the_table(tmp_path, capsys):
    flags = ["--claim", 12, "--seeds", 2, "--iterations", 10, "--jobs", 2, "--out", tmp_path]
    assert run("laboratory.py", *flags) == 0
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "gmm").glob("*.json")}
    assert len(first) == 10  # 2 arms at 2 learning rates and the untrained network, 2 seeds
    where = tmp_path / "claims-12-iterations-10-seeds-2"
    table = (where / "gmm.md").read_text()
    assert "| 12 |" in table and "sliced_unguided" in table and "| untrained |" in table and (where / "gmm-12.png").is_file()
    assert "another version" not in capsys.readouterr().out
    next(iter(first)).unlink()
    assert run("laboratory.py", *flags) == 0
    second = {path: path.stat().st_mtime_ns for path in (tmp_path / "gmm").glob("*.json")}
    assert second.keys() == first.keys() and sum(first[path] != second[path] for path in first) == 1
    assert (where / "gmm.md").read_text() == table  # the run that was lost came out the same


def test_every_arm_of_the_laboratory_is_a_command_that_train_py_takes():
    for family, claims in laboratory.CLAIMS.items():
        for claim in claims:
            arms = {name: train.parse_arguments(laboratory.arguments("x", family, flags, "1e-3", 0))
                    for name, flags in claim.arms.items()}
            for (arm_a, _), sign, (arm_b, _) in claim.expected:
                assert {arm_a, arm_b} <= arms.keys() | {"untrained"} and sign in "<>"
            budgets = {(args.iterations, args.batch_size, args.guidance, args.student_steps) for args in arms.values()}
            assert len(budgets) == 1  # no arm of a claim gets more than another


def test_verdicts_need_a_95_percent_interval():
    claim = laboratory.Claim(1, "", "", {}, (), [(("a", "kl"), "<", ("b", "kl")), (("a", "kl"), ">", ("b", "kl")), (("a", "near"), ">", ("b", "near"))])
    arms = {"a": [{"kl": 1.0, "near": 0.1}, {"kl": 1.1, "near": 0.9}], "b": [{"kl": 2.0, "near": 0.2}, {"kl": 2.1 + 1e-3}]}
    verdicts = laboratory.judge(claim, arms)  # the second run of b did not live to have its `near` measured
    assert list(verdicts.values()) == ["yes", "opposite", "not resolved"] and laboratory.in_words(verdicts) == "1 yes, 1 opposite, 1 not resolved"
    arms["b"][1]["kl"] = 2.3  # a difference of 1.1 +- 0.1: within Student's interval for one degree of freedom
    assert list(laboratory.judge(claim, arms).values())[0] == "not resolved"


def test_interrupted_run_saves_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    """The real signal, sent from inside the second iteration."""
    real = models.last_input
    calls = []

    def run_and_interrupt(*args):
        calls.append(1)
        if len(calls) == 4:  # the first two are the gallery's
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(models, "last_input", run_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert run("train.py", "--out", tmp_path / "run", "--iterations", 9, *TINY) == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert newest(tmp_path / "run") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(number):
    with train.StopAtSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked == number
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_disk_that_fills_up_leaves_the_earlier_state(finished, tmp_path, capsys):
    """Files over 1 MB fail to be written, as on a full disk."""
    shutil.copytree(finished, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        assert run("train.py", "--resume", tmp_path / "run", "--iterations", 6) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "untouched" in capsys.readouterr().err
    assert newest(tmp_path / "run") == 4 and same_weights(state(tmp_path / "run"), state(finished))
    assert same_weights(weights(tmp_path / "run" / "student"), weights(finished / "student"))


def test_a_health_figure_out_of_range_is_warned_of_once(tmp_path, capsys):
    log = train.Log(tmp_path, teacher_std=1.0, iteration=0, saved={})
    figures = {"std": torch.tensor(1.1), "gap": torch.tensor(0.8)}
    for iteration in range(10, 60, 10):
        log.add(iteration, figures)
        log.check_health()
    assert "warning" not in capsys.readouterr().out
    for iteration in range(60, 400, 10):
        log.add(iteration, figures | {"std": torch.tensor(2.5)})
        log.check_health()
    printed = capsys.readouterr().out
    assert printed.count("warning") == 1 and "over-saturates" in printed


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_a_good_student(tmp_path, capsys):
    assert run("train.py", "--out", tmp_path / "run", "--iterations", 50, *TINY, "--learning-rate", "1e30") == 1
    message = capsys.readouterr().err
    assert "not finite" in message and "last good student" in message
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run" / "student").values())


def test_other_seed_other_student(finished, tmp_path):
    assert run("train.py", "--out", tmp_path / "run", "--iterations", 4, "--seed", 1, *TINY) == 0
    assert not same_weights(weights(tmp_path / "run" / "student"), weights(finished / "student"))


def test_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train.py", "--benchmark", 2, *TINY) == 0
    assert "s an iteration" in capsys.readouterr().out and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- sampling and judging

def test_sample_draws_the_grid(finished, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("cat face\n\nred apple\n")
    assert run("sample.py", "--student", finished, "--prompts", tmp_path / "prompts.txt", "--teacher-steps", 3,
               "--out", tmp_path / "grid.png") == 0
    printed = capsys.readouterr().out
    assert "teacher, 3 steps" in printed and "student, 1 step" in printed and "x the speed" in printed
    picture = Image.open(tmp_path / "grid.png")
    assert picture.width > 2 * 128 and picture.height > 6 * 128


def test_noise_depends_on_seed_step_and_column_alone():
    model = models.load_model(data.EMOJI_TEACHER)
    torch.testing.assert_close(sample.column_noise(model, 2, 4, 7), sample.column_noise(model, 5, 4, 7)[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(sample.column_noise(model, 2, 2, 7), sample.column_noise(model, 2, 4, 7)[:2], rtol=0, atol=0)
    assert (sample.column_noise(model, 2, 4, 7) != sample.column_noise(model, 2, 4, 8)).any()
    assert torch.equal(sample.column_noise(model, 2, 2, seed=0, first=1), sample.column_noise(model, 3, 2, seed=0)[:, 1:])  # parts of an evaluation


def test_embedded_teacher_is_a_stable_diffusion_pipeline_and_our_sampler_draws_what_diffusers_draws():
    model, prompts = models.load_model(data.EMOJI_TEACHER), ["cat face", "red apple"]
    noise = sample.column_noise(model, 2, 1, 0)
    ours = model.decode(sample.teacher_row(model, 10, 3.0).draw(noise, model.encode(prompts)))
    pipe = StableDiffusionPipeline.from_pretrained(data.EMOJI_TEACHER, safety_checker=None)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.float()
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompts, latents=noise[0], num_inference_steps=10, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_student_in_plain_diffusers_draws_what_our_sampler_draws(finished):
    """The snippet of the README, from the same noise."""
    model = models.load_model(data.EMOJI_TEACHER)
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(2, *model.sample_shape, generator=generator) for _ in range(4)])
    row = sample.student_row(models.load_student(finished, model), model.schedule.timesteps(4))
    ours = model.decode(row.draw(noise, model.encode(["cat face", "red apple"])))
    pipe = StableDiffusionPipeline.from_pretrained(data.EMOJI_TEACHER, safety_checker=None,
                                                   unet=UNet2DConditionModel.from_pretrained(finished / "student"))
    for part in (pipe.vae, pipe.text_encoder):
        part.float()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    generator.manual_seed(0)
    torch.randn(2, *model.sample_shape, generator=generator)  # noise[0]; the scheduler draws the rest
    theirs = pipe(["cat face", "red apple"], latents=noise[0], timesteps=[999, 749, 499, 249], guidance_scale=0,
                  generator=generator, output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_maker_of_the_teacher_resumes_and_writes_a_pipeline(tmp_path):
    flags = ["--out", tmp_path / "teacher", "--work", tmp_path / "work", "--pictures", 6, "--batch-size", 4,
             "--autoencoder-iterations", 2, "--narrow-iterations", 2, "--wide-iterations", 2, "--device", "cpu"]
    assert run("make_teacher.py", *flags, "--decoder-iterations", 1) == 0
    before = (tmp_path / "work" / "denoiser-wide.pt").stat().st_mtime_ns
    assert run("make_teacher.py", *flags, "--decoder-iterations", 2) == 0
    assert (tmp_path / "work" / "denoiser-wide.pt").stat().st_mtime_ns == before  # a stage that is done is not done again
    assert torch.load(tmp_path / "work" / "decoder.pt", weights_only=True)["iteration"] == 2
    model = models.load_model(tmp_path / "teacher")
    assert model.sample_shape == (8, 8, 8) and model.decode(torch.zeros(1, 8, 8, 8)).shape == (1, 3, 64, 64)


def test_embedded_teacher_is_small():
    assert sum(path.stat().st_size for path in data.EMOJI_TEACHER.rglob("*") if path.is_file()) < 24e6


def test_eval_writes_every_number_with_its_error(finished, tmp_path):
    out = tmp_path / "numbers"
    assert run("eval.py", "--student", finished, "--samples", 8, "--steps", 1, "--teacher-steps", 2, "--out", out) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["samples"] == 8
    assert [row["label"].split(",")[0] for row in report["rows"]] == ["teacher", "teacher", "teacher", "student", "real pictures"]
    for row in report["rows"]:
        for name in ("alignment", "coverage", "frechet", "mean", "deviation", "saturation", "diversity"):
            assert math.isfinite(row[name]["value"]) and row[name]["standard_error"] >= 0
    assert report["rows"][-1]["alignment"]["value"] >= 7 / 8


# ---------------------------------------------------------------------------------------------------- bad input

def bad_inputs():
    """(script, arguments, what the one line says); {run} and {tmp} are filled in."""
    return [
        ("train.py", ["--iteratons", "5"], "did you mean --iterations?"),
        ("train.py", ["--iter", "5"], "unknown argument"),
        ("train.py", ["--variant", "dmd3"], "invalid choice"),
        ("train.py", ["--student-steps", "0"], "above 0"),
        ("train.py", ["--student-steps", "2000"], "noise levels"),
        ("train.py", ["--guidance", "nan"], "above 0"),
        ("train.py", ["--divergence", "js", "--gan-weight", "0"], "needs a --gan-weight above 0"),
        ("train.py", ["--gan-weight", "-1"], "0 or above"),
        ("train.py", ["--dm-weight", "0", "--ca-weight", "0", "--gan-weight", "0.00"], "nothing moves the student"),
        ("train.py", ["--mean-variance-target", "nan", "1"], "are not a mean and a variance"),
        ("train.py", ["--model", "gmm", "--variant", "dmd", "--pairs", "{tmp}/pairs", "--guidance", "7"], "made with guidance 3, the run has 7"),
        ("train.py", ["--model", "gmm", "--variant", "dmd", "--pairs", "{tmp}/unfinished-pairs"], "lacks 1 of 2 files of 300 noise-image pairs"),
        ("train.py", ["--model", "gmm", "--variant", "dmd", "--pairs", "{tmp}/pairs", "--regression", "lpips"], "compares pictures"),
        ("train.py", ["--schedule", "mixed"], "invalid choice"),
        ("train.py", ["--mean-variance-target", "0", "0"], "are not a mean and a variance"),
        ("train.py", ["--variant", "dmd"], "needs noise-image pairs"),
        ("train.py", ["--variant", "dmd", "--pairs", "{tmp}/absent"], "no noise-image pairs in"),
        ("train.py", ["--model", "gmm", "--variant", "dmd", "--pairs", "{tmp}/damaged-pairs"], "damaged or holds no noise and x0"),
        ("train.py", ["--variant", "dmd", "--pairs", "{tmp}/pairs"], "were made by the weights of gmm"),
        ("train.py", ["--model", "{tmp}/elsewhere", "--variant", "dmd2"], "need real data"),
        ("train.py", ["--model", "{tmp}/elsewhere", "--variant", "decoupled", "--student-input", "data"], "need real data"),
        ("train.py", ["--model", "gmm", "--prompts", "{tmp}/words.txt", "--out", "{tmp}/words"], "'cat' is no prompt of gmm"),
        ("train.py", ["@{tmp}/absent.args"], "the recipe cannot be read: No such file"),
        ("data.py", ["pairs"], "--out"),
        ("data.py", ["pairs", "--out", "/proc/nowhere"], "cannot be written to"),
        ("data.py", ["pairs", "--out", "{tmp}/many", "--steps", "5000"], "noise levels"),
        ("laboratory.py", ["--claim", "99"], "there is no claim 99"),
        ("laboratory.py", ["--out", "/proc/nowhere"], "cannot be written to"),
        ("train.py", ["--model", "{tmp}/absent/model"], "no model directory"),
        ("train.py", ["--model", "{tmp}"], "model_index.json"),
        ("train.py", ["--model", "{tmp}/damaged"], "cannot be loaded"),
        ("train.py", ["--device", "nonsense"], "--device nonsense cannot be used"),
        ("train.py", ["--prompts", "{tmp}/absent.txt"], "cannot be read"),
        ("train.py", ["--prompts", "{tmp}/empty.txt"], "holds no prompt"),
        ("train.py", ["--out", "{run}"], "holds an earlier run"),
        ("train.py", ["--out", "{tmp}", "--overwrite"], "no run directory"),
        ("train.py", ["--out", "/proc/nowhere"], "cannot be written to"),
        ("train.py", ["--out", "{tmp}/empty.txt"], "is a file"),
        ("train.py", ["--resume", "{tmp}/absent"], "no run to resume"),
        ("train.py", ["--resume", "{run}", "--seed", "3"], "seed was 0, is 3"),
        ("train.py", ["--resume", "{run}", "--learning-rate", "1e-5", "--fake-updates", "3"], "fake_updates was 2, is 3; learning_rate was 0.0002, is 1e-05"),
        ("train.py", ["--resume", "{tmp}/truncated/checkpoints/000004"], "000004 is damaged: shard-00001-model-00001-of-00001.safetensors has 100000 bytes"),
        ("train.py", ["--resume", "{tmp}/truncated"], "no checkpoint that is whole"),
        ("train.py", ["--resume", "{tmp}/no-checkpoint"], "no complete checkpoint"),
        ("train.py", ["--resume", "{tmp}/nowhere"], "there is no such directory"),
        ("train.py", ["--resume", "{run}/checkpoints/000003"], "there is no checkpoint"),
        ("train.py", ["--resume", "{tmp}/no-file/checkpoints/000004"], "manifest.json is missing"),
        ("train.py", ["--resume", "{tmp}/other-weights"], "the teacher's weights are others"),
        ("train.py", ["--resume", "{tmp}/other-network"], "norm_eps was 0.001, is"),
        ("train.py", ["--reset-optimizer"], "needs --resume"),
        ("train.py", ["--keep", "0"], "above 0"),
        ("sample.py", ["--steps", "0"], "above 0"),
        ("sample.py", ["--seed", "-1"], "--seed"),
        ("sample.py", ["--student", "{tmp}/absent"], "no student"),
        ("sample.py", ["--student", "{tmp}"], "no student"),
        ("sample.py", ["--student", "{tmp}/other"], "another architecture"),
        ("sample.py", ["--student", "{run}", "--prompts", "{tmp}/empty.txt"], "holds no prompt"),
        ("sample.py", ["--student", "{run}", "--prompts", ""], "holds no prompt"),
        ("sample.py", ["--student", "{run}", "--prompts", "cat", "--out", "/proc/nowhere/x.png"], "cannot be written"),
        ("sample.py", ["--student", "{run}", "--out", "{tmp}/grid.txt"], "should end in .png"),
        ("eval.py", ["--student", "{run}", "--out", "{tmp}/words.txt"], "is a file"),
        ("eval.py", ["--student", "{run}", "--out", "/proc/nowhere"], "cannot be written to"),
        ("eval.py", ["--student", "{run}", "--samples", "5000"], "captions"),
    ]


@pytest.fixture(scope="module")
def places(finished, plane_pairs, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    shutil.copytree(plane_pairs, tmp / "pairs")
    shutil.copytree(plane_pairs, tmp / "damaged-pairs")
    shutil.copytree(plane_pairs, tmp / "unfinished-pairs")
    (tmp / "unfinished-pairs" / "00001.safetensors").unlink()
    file = tmp / "damaged-pairs" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    (tmp / "words.txt").write_text("cat\n")
    shutil.copytree(data.EMOJI_TEACHER, tmp / "elsewhere")
    (tmp / "empty.txt").write_text("\n \n")
    shutil.copytree(data.EMOJI_TEACHER, tmp / "damaged")
    weight_file = tmp / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    weight_file.write_bytes(weight_file.read_bytes()[:100_000])
    shutil.copytree(finished, tmp / "truncated")
    for folder in checkpoint.complete_checkpoints(tmp / "truncated"):
        for file in folder.glob("*.safetensors"):
            os.truncate(file, 100_000)
    shutil.copytree(finished, tmp / "no-checkpoint", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(finished, tmp / "no-file", ignore=shutil.ignore_patterns("manifest.json"))
    for name, spoil in (("other-weights", dict(teacher="0")), ("other-network", dict(network=json.loads((finished / "student" / "config.json").read_text()) | {"norm_eps": 1e-3}))):
        shutil.copytree(finished, tmp / name)
        rewrite_manifest(tmp / name, **spoil)
    UNet2DConditionModel(sample_size=8, in_channels=8, out_channels=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "DownBlock2D"),
                         up_block_types=("UpBlock2D", "UpBlock2D"), cross_attention_dim=128, layers_per_block=1).save_pretrained(tmp / "other")
    return {"run": str(finished), "tmp": str(tmp)}


@pytest.mark.parametrize("script, arguments, says", bad_inputs(), ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_bad_input_is_one_line_and_status_2_and_changes_nothing(script, arguments, says, places, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path(places["run"]).rglob("*")}
    assert run(script, *(argument.format(**places) for argument in arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(script)]
    assert len(lines) == 1 and says in lines[0], lines
    assert before == {path: path.stat().st_mtime_ns for path in Path(places["run"]).rglob("*")}


def test_lpips_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert run("data.py", "pairs", "--out", tmp_path / "pairs", "--count", 2, "--steps", 2) == 0
    assert run("train.py", "--variant", "dmd", "--pairs", tmp_path / "pairs", "--regression", "lpips") == 2
    assert "--regression lpips needs a package that is not installed: pip install lpips" in capsys.readouterr().err


def test_an_existing_run_is_replaced_when_asked(tmp_path):
    for _ in range(2):
        assert run("train.py", "--out", tmp_path / "run", "--iterations", 1, "--overwrite", *TINY) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["iterations"] == 1


def rewrite_manifest(run, **changes):
    """As whoever wants to deceive would: with the right checksum."""
    for folder in checkpoint.complete_checkpoints(run):
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        manifest["files"] = {file.name: [file.stat().st_size, checkpoint.digest(file)] for file in folder.glob("*.safetensors")}
        del manifest["sha256"]
        manifest["sha256"] = checkpoint.text_digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_of_something_else_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    save_file({name: torch.zeros(3) for name in state(finished)}, checkpoint.complete_checkpoints(tmp_path / "run")[0] / "shard-00001-model-00001-of-00001.safetensors")
    rewrite_manifest(tmp_path / "run", iteration=4)
    assert run("train.py", "--resume", tmp_path / "run", "--iterations", 6) == 2
    assert "does not fit this run: student.network.conv_in.weight is (3,), not" in capsys.readouterr().err


def test_nothing_in_a_checkpoint_is_executed(finished, tmp_path, capsys):
    """A pickle that would write a file when loaded plainly."""
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    shutil.copytree(finished, tmp_path / "run")
    torch.save({"iteration": Trap()}, checkpoint.complete_checkpoints(tmp_path / "run")[0] / "shard-00001-model-00001-of-00001.safetensors")
    rewrite_manifest(tmp_path / "run", iteration=4)
    assert run("train.py", "--resume", tmp_path / "run", "--iterations", 6) == 2
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "sprung").exists()


def test_what_a_run_may_go_on_with_otherwise_if_it_is_meant(plane_run, tmp_path, capsys):
    """Another learning rate and a GAN that was not there before; fresh optimizers; an older checkpoint, which sets newer ones aside."""
    run_directory = tmp_path / "run"
    shutil.copytree(plane_run, run_directory)
    changes = ["--learning-rate", "1e-5", "--gan-weight", "0.1", "--allow-changes"]
    assert run("train.py", "--resume", run_directory / "checkpoints" / "000002", "--iterations", 6, *changes) == 0
    assert "with a new GAN head" in capsys.readouterr().out
    assert json.loads((run_directory / "config.json").read_text())["learning_rate"] == 1e-5
    assert newest(run_directory) == 6 and (run_directory / "checkpoints" / "000004.aside-1").is_dir() and "fake_score.head.layers.0.weight" in state(run_directory)
    steps = {float(value) for name, value in state(run_directory).items() if name.startswith("student_optimizer") and name.endswith("step")}
    assert steps == {3.0}  # every second iteration of six
    assert run("train.py", "--resume", run_directory, "--iterations", 8, "--reset-optimizer") == 0
    assert "with new optimizers" in capsys.readouterr().out
    steps = {float(value) for name, value in state(run_directory).items() if name.startswith("student_optimizer") and name.endswith("step")}
    assert steps == {1.0}


def stopped_at_its_beginning(monkeypatch, *arguments):
    """A run that ends after config.json is written and before anything is computed."""
    with monkeypatch.context() as context:
        context.setattr(gmm.Gallery, "__init__", lambda *arguments: sys.exit(9))
        assert run("train.py", *arguments) == 9


def test_a_run_that_was_stopped_before_its_first_save_begins_again(plane_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    stopped_at_its_beginning(monkeypatch, "--out", out, "--iterations", 4, "--gan-weight", 0, *PLANE)
    assert run("train.py", "--resume", out) == 0 and "from the beginning" in capsys.readouterr().out
    assert faults.same_state(out, plane_run)


def test_changes_and_new_optimizers_hold_when_the_first_save_was_never_reached(plane_run, tmp_path, capsys, monkeypatch):
    meant, stopped = tmp_path / "meant", tmp_path / "stopped"
    for out in (meant, stopped):
        shutil.copytree(plane_run, out)
    changes = ["--iterations", 8, "--learning-rate", "1e-5", "--gan-weight", "0.1", "--allow-changes", "--reset-optimizer"]
    assert run("train.py", "--resume", meant, *changes) == 0
    stopped_at_its_beginning(monkeypatch, "--resume", stopped, *changes)
    assert run("train.py", "--resume", stopped, "--learning-rate", "3e-5") == 2  # another change, which nobody allowed
    assert "learning_rate was 1e-05, is 3e-05" in capsys.readouterr().err
    assert run("train.py", "--resume", stopped) == 0
    assert faults.same_state(meant, stopped)
    assert "with new optimizers" in capsys.readouterr().out
    assert run("train.py", "--resume", stopped, "--iterations", 10) == 0
    assert "with new optimizers" not in capsys.readouterr().out  # from here on there was a save
    manifest = checkpoint.read_manifest(checkpoint.complete_checkpoints(stopped)[0])
    assert manifest["iteration"] == 10 and manifest["fresh_since"] == 4  # warm-up counts from the new optimizers' beginning


def test_other_prompts_under_the_same_name_are_refused(tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("0\n1\n")
    assert run("train.py", "--out", out, "--prompts", prompts, "--iterations", 2, "--gan-weight", 0, *PLANE) == 0
    prompts.write_text("0\n2\n")
    assert run("train.py", "--resume", out, "--iterations", 4) == 2 and "prompts was 2 (" in capsys.readouterr().err
    assert run("train.py", "--resume", out, "--iterations", 4, "--allow-changes") == 0


def test_flags_are_those_of_the_checkpoint_that_is_gone_on_from(plane_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(plane_run, out)
    assert run("train.py", "--resume", out, "--iterations", 6, "--learning-rate", "1e-5", "--allow-changes", "--keep", 3) == 0
    shutil.copytree(out, tmp_path / "named")
    assert run("train.py", "--resume", tmp_path / "named" / "checkpoints" / "000002") == 0
    assert json.loads((tmp_path / "named" / "config.json").read_text())["learning_rate"] == 2e-4
    # From where the rate was changed it goes on as it did then, also if what came after is damaged.
    before = state(out)
    os.truncate(next((out / "checkpoints" / "000006").glob("*.safetensors")), 1000)
    assert run("train.py", "--resume", out) == 0 and "000006.aside-1" in capsys.readouterr().out
    after = state(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    # What was set aside comes back when it gets its name back, with the flags that it had.
    assert run("train.py", "--resume", tmp_path / "named" / "checkpoints" / "000002", "--iterations", 4) == 0
    folder = tmp_path / "named" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["000002", "000004", "000004.aside-1", "000004.aside-2", "000006.aside-1"]


def test_the_newest_checkpoints_are_kept(tmp_path):
    assert run("train.py", "--out", tmp_path / "run", "--iterations", 8, "--keep", 3, "--gan-weight", 0, *PLANE) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["000004", "000006", "000008"]


def test_a_line_of_metrics_that_was_cut_short_is_dropped(plane_run, tmp_path):
    shutil.copytree(plane_run, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "sec')
    assert run("train.py", "--resume", tmp_path / "run", "--iterations", 10) == 0
    assert [json.loads(line)["iteration"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [10]


def test_figures_and_pictures_are_sent_to_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert run("train.py", "--out", tmp_path / "run", "--iterations", 10, "--gan-weight", 0, "--track", "wandb", *PLANE) == 0
    offline, = (tmp_path / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb")) and list((offline / "files" / "media" / "images").glob("picture_*.png"))
