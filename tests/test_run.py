"""The commands as a user runs them, bad input included."""

import json
import os
import shutil
import signal

import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import fsdp
import sample
import train
from lab import faults, plane
from support import checkpoint, embedded, runlog
from support.cli import UserError
from support.networks import Networks

PLANE = ["--batch-size", "8", "--fake-updates", "2", "--warmup", "0", "--save-every", "2"]
TINY = [
    "--batch-size",
    "2",
    "--fake-updates",
    "2",
    "--warmup",
    "0",
    "--save-every",
    "2",
]


def words(*arguments):
    return [str(word) for word in arguments]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the embedded teacher that the tests read, and must not change."""
    out = tmp_path_factory.mktemp("runs") / "four"
    train.main(words("--out", out, "--iterations", 4, *TINY))
    return out


@pytest.fixture(scope="module")
def plane_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plane"
    plane.main(words("--out", out, "--iterations", 4, *PLANE))
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, plane_model):
    out = tmp_path_factory.mktemp("pairs") / "pairs"
    config = {"prompts": None, "count": 300, "steps": 2, "guidance": 1.0, "seed": 0}
    data.make_pairs(out, config, plane_model)
    return out


# ----------------------------------------------------------------------------- the run directory


def test_run_directory(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "curves.png", "teacher_samples.safetensors"),
        *("images", "checkpoints", "student"),
    }
    assert [path.name for path in checkpoint.complete_checkpoints(finished)] == ["000004", "000002"]
    assert len(list((finished / "images").iterdir())) == 3
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [4]  # shorter than ten iterations: one row
    assert {"fake_loss", "dm", "ca", "mean", "std", "gap", "cosine"} <= rows[0].keys()


def test_metrics_have_a_row_each_ten_iterations_and_the_rest(tmp_path):
    plane.main(words("--out", tmp_path / "run", "--iterations", 23, *PLANE))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [10, 20, 23]


VARIANTS = {
    "dmd": "--variant dmd --pairs {pairs}",
    "dmd2": "--variant dmd2 --gan-weight 0.1 --student-steps 4",
    "data": "--gan-weight 0.1 --student-steps 4 --student-input data",
    "fdistill": "--variant fdistill --gan-weight 0.1",
    "decoupled": "--variant decoupled --guidance 1.5 --ema 0",
    "regression only": "--dm-weight 0 --ca-weight 0 --regression-weight 1 --pairs {pairs}",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_is_an_undisturbed_one_bit_for_bit(name, pairs, tmp_path):
    flags = [*PLANE, *VARIANTS[name].format(pairs=pairs).split()]
    plane.main(words("--out", tmp_path / "whole", "--iterations", 5, *flags))
    plane.main(words("--out", tmp_path / "halves", "--iterations", 3, *flags))
    plane.main(words("--resume", tmp_path / "halves", "--iterations", 5))
    assert faults.same_state(tmp_path / "whole", tmp_path / "halves")


def test_a_damaged_checkpoint_is_passed_over(plane_run, tmp_path, capsys):
    shutil.copytree(plane_run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "000004" / "manifest.json").unlink()
    plane.main(words("--resume", tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "000004 is damaged" in printed and "checkpoints/000002" in printed
    assert faults.same_state(tmp_path / "run", plane_run)


def test_flags_override_a_resumed_run_s_and_are_kept(plane_run, tmp_path, capsys):
    shutil.copytree(plane_run, tmp_path / "run")
    plane.main(words("--resume", tmp_path / "run", "--iterations", 6, "--learning-rate", 1e-5))
    printed = capsys.readouterr().out
    assert "changed: iterations was 4, is 6" in printed
    assert "changed: learning_rate was 0.001, is 1e-05" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["learning_rate"] == 1e-5 and config["iterations"] == 6


@pytest.mark.parametrize(
    "spoil, says",
    [
        ({"launcher": "runs.evil"}, "a flag that is not known: launcher"),
        ({"track": "runs.evil"}, "invalid choice: 'runs.evil'"),
        ({"batch_size": -4}, "not a whole number above 0"),
        ({"variant": "dmd3"}, "'dmd3' is not one of"),
        ({"divergence": "kl"}, "'kl' is not one of"),
        ({"noise_levels": ["@/etc/passwd", 1]}, "should be numbers"),
    ],
)
def test_saved_flags_go_through_the_parser(spoil, says, plane_run, tmp_path):
    shutil.copytree(plane_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | spoil))
    with pytest.raises(UserError, match=says):
        plane.main(words("--resume", tmp_path / "run"))


def test_init_takes_student_and_fake_score_and_makes_the_rest_anew(plane_run, tmp_path, capsys):
    out = tmp_path / "next"
    flags = words("--init", plane_run, "--gan-weight", 0.1, "--out", out, "--iterations", 1)
    args = train.parse_arguments([f"@{plane.RECIPE}", *flags])
    nets, _ = train.prepare(args, plane.load_model)
    assert "with a new head" in capsys.readouterr().out
    saved = faults.state_of(plane_run)
    for part, module in (("averaged_student", nets.student), ("fake_score", nets.fake_score)):
        for name, tensor in module.state_dict().items():
            if "head." not in name:
                assert torch.equal(tensor, saved[f"{part}.{name}"]), name
    assert not nets.student_optimizer.state and not nets.fake_optimizer.state


def test_a_run_without_a_checkpoint_begins_again(plane_run, tmp_path):
    shutil.copytree(plane_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    plane.main(words("--resume", tmp_path / "run"))
    assert faults.same_state(tmp_path / "run", plane_run)


# ----------------------------------------------------------------------------- what goes wrong


def test_the_teacher_s_samples_are_drawn_once_and_fewer_where_it_is_slow(
    teacher, tmp_path, monkeypatch, capsys
):
    args = train.parse_arguments(words(*TINY, "--guidance", "2", "--dtype", "float32"))
    nets = Networks(teacher, args)
    prompts = data.training_prompts(None, teacher)
    for name in ("whole", "few"):
        (tmp_path / name).mkdir()
    whole = runlog.Gallery(tmp_path / "whole", nets, prompts, args)
    assert whole.x_teacher.shape == (8, *teacher.sample_shape)
    assert "16/16" in capsys.readouterr().err
    assert whole.teacher_metrics == runlog.metrics_of(whole.x_teacher)
    monkeypatch.setattr(runlog, "PATIENCE", 0)
    few = runlog.Gallery(tmp_path / "few", nets, prompts, args)
    assert torch.equal(few.x_teacher, whole.x_teacher[:2]) and len(few.prompts) == 2
    assert Image.open(few.draw(0)).width < Image.open(whole.draw(0)).width

    monkeypatch.setattr(runlog.Gallery, "draw_teacher", None)  # as in a resumed run
    for name, gallery in (("whole", whole), ("few", few)):
        again = runlog.Gallery(tmp_path / name, nets, prompts, args)
        assert torch.equal(again.x_teacher, gallery.x_teacher)
    args.guidance = 3.0
    with pytest.raises(TypeError):  # others are needed
        runlog.Gallery(tmp_path / "whole", nets, prompts, args)


def test_a_signal_saves_and_says_how_to_go_on(plane_run, tmp_path, capsys, monkeypatch):
    iterate = train.iterate

    def interrupted(nets, batch, iteration, args):
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(nets, batch, iteration, args)

    monkeypatch.setattr(train, "iterate", interrupted)
    with pytest.raises(SystemExit) as end:
        plane.main(words("--out", tmp_path / "run", "--iterations", 4, *PLANE))
    assert end.value.code == 128 + signal.SIGTERM
    assert f"go on with --resume {tmp_path / 'run'}" in capsys.readouterr().out
    monkeypatch.setattr(train, "iterate", iterate)
    plane.main(words("--resume", tmp_path / "run"))
    assert faults.same_state(tmp_path / "run", plane_run)


def test_a_gradient_that_is_not_finite_keeps_a_good_student(tmp_path, monkeypatch):
    clip = fsdp.clip_gradients

    def spoiled(module, *rest):
        next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return clip(module, *rest)

    monkeypatch.setattr(fsdp, "clip_gradients", spoiled)
    with pytest.raises(UserError, match="--learning-rate LOWER") as error:
        plane.main(words("--out", tmp_path / "run", "--iterations", 4, *PLANE))
    assert error.value.status == 1
    student = tmp_path / "run" / "student" / "diffusion_pytorch_model.safetensors"
    assert all(tensor.isfinite().all() for tensor in models_of(student).values())


def models_of(file):
    from safetensors.torch import load_file

    return load_file(file)


def test_a_health_metric_out_of_range_is_warned_of_once(tmp_path, capsys):
    flags = words("--learning-rate", 0.05, "--iterations", 60, "--keep-going", *PLANE)
    plane.main([*flags, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.count("warning: the health metric std") == 1


BAD = [
    (train, "--iteratons 5", "did you mean --iterations"),
    (train, "--variant dmd3", "'dmd3' is not one of dmd, dmd2"),
    (train, "--student-steps 0", "above 0"),
    (train, "--student-steps 2000", "noise levels"),
    (train, "--guidance nan", "above 0"),
    (train, "--divergence js --gan-weight 0", "needs a --gan-weight above 0"),
    (train, "--divergence kl", "is not one of"),
    (train, "--gan-weight -1", "0 or above"),
    (train, "--noise-levels 0.5 0.5", "is not below"),
    (train, "--dm-weight 0 --ca-weight 0 --gan-weight 0", "nothing moves the student"),
    (train, "--student-input data --first-timestep 399", "does not go with"),
    (train, "--schedule mixed", "is not one of"),
    (train, "--variant dmd", "needs noise-image pairs"),
    (train, "--variant dmd --pairs {tmp}/absent", "no noise-image pairs in"),
    (train, "--variant dmd --pairs {pairs}", "were made by the weights of"),
    (plane, "--variant dmd --pairs {pairs} --guidance 7", "made with guidance 1, the run has 7"),
    (train, "--model {tmp}/absent/model", "no model directory"),
    (train, "--model {tmp}", "model_index.json"),
    (train, "--device nonsense", "cannot be used"),
    (train, "--prompts {tmp}/absent.txt", "cannot be read"),
    (train, "--prompts {tmp}/empty.txt", "holds no prompt"),
    (train, "--out {run}", "is not empty"),
    (train, "--out /proc/nowhere", "cannot be written to"),
    (train, "--out {tmp}/empty.txt", "is a file"),
    (train, "--resume {tmp}/absent", "no run to resume"),
    (train, "--resume {run}/checkpoints/000002", "takes a run directory"),
    (train, "--resume {run} --variant fdistill", "is a preset for the beginning"),
    (train, "@{tmp}/absent.args", "the recipe cannot be read"),
    (sample, "--steps 0", "above 0"),
    (sample, "--student {tmp}/absent", "no student"),
    (sample, "--student {run} --out {tmp}/grid.txt", "should end in .png"),
    (sample, "--student {run} --prompts {tmp}/empty.txt", "holds no prompt"),
    (data, "pairs", "--out"),
    (data, "latents --out {tmp}/x", "need --images DIR"),
    (evaluation, "--student {run} --out {tmp}/empty.txt", "is a file"),
    (evaluation, "--student {run} --protocol fid --out {tmp}/e", "is not one of"),
]


@pytest.mark.parametrize("command, flags, says", BAD, ids=[row[1] for row in BAD])
def test_bad_input_is_one_error_and_changes_nothing(
    command, flags, says, finished, pairs, tmp_path
):
    (tmp_path / "empty.txt").write_text("\n \n")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    filled = [word.format(tmp=tmp_path, run=finished, pairs=pairs) for word in flags.split()]
    with pytest.raises(UserError) as error:
        command.main(filled)
    assert error.value.status == 2
    assert says in str(error.value) and "\n" not in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


# ----------------------------------------------------------------------------- samples and numbers


def test_sample_draws_a_grid_of_several_students(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "other")
    out = tmp_path / "grid.png"
    flags = ["--compare", finished, tmp_path / "other", "--prompts", "cat", "--teacher-steps", 2]
    sample.main(words(*flags, "--out", out, "--images", tmp_path / "images"))
    assert Image.open(out).height > 4 * 128
    assert len(list((tmp_path / "images").iterdir())) == 4
    assert "x the speed" in capsys.readouterr().out


def test_a_student_of_the_old_format_is_drawn(finished, tmp_path):
    """Before the redesign config.json had other flags besides."""
    run = tmp_path / "old"
    shutil.copytree(finished / "student", run / "student")
    config = json.loads((finished / "config.json").read_text())
    config |= {"picture_every": 100, "vae_device": None, "began": {"from": None, "launch": "x"}}
    (run / "config.json").write_text(json.dumps(config))
    sample.main(
        words("--student", run, "--prompts", "cat", "--teacher-steps", 2, "--out", run / "x.png")
    )
    assert (run / "x.png").is_file()


def test_noise_depends_on_seed_step_and_column_alone(teacher):
    many = sample.column_noise(teacher, 4, 3, seed=1)
    assert torch.equal(many[:2, 2:3], sample.column_noise(teacher, 1, 3, seed=1, first=2)[:2])
    assert not torch.equal(many, sample.column_noise(teacher, 4, 3, seed=2))


def test_eval_writes_every_number_with_its_error_and_goes_on(finished, tmp_path, capsys):
    out = tmp_path / "evaluation"
    flags = ["--student", finished, "--samples", 4, "--teacher-steps", 2, "--steps", 1]
    flags += ["--no-coverage", "--out", out]
    evaluation.main(words(*flags))
    report = json.loads((out / "metrics.json").read_text())
    labels = [row["label"] for row in report["rows"]]
    assert labels[0] == "teacher, 2 steps, guidance 7.5" and labels[-1] == "real images"
    assert all("alignment" in row and "frechet" in row for row in report["rows"])
    printed = capsys.readouterr().out
    table = printed.split("WARNING")[0]
    assert max(map(len, table.splitlines())) <= 100
    parts = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    evaluation.main(words(*flags))
    assert parts == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert json.loads((out / "metrics.json").read_text())["rows"] == report["rows"]


def test_eval_draws_a_curve_over_a_run_s_checkpoints(finished, tmp_path):
    folders = sorted((finished / "checkpoints").iterdir())
    flags = ["--compare", *folders, "--samples", 4, "--teacher-steps", 2, "--no-coverage"]
    evaluation.main(words(*flags, "--out", tmp_path / "e"))
    assert (tmp_path / "e" / "curves.png").is_file()


def test_the_embedded_teacher_draws_what_diffusers_draws(teacher):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(teacher.name, safety_checker=None)
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    noise = sample.column_noise(teacher, 2, 1, seed=0)
    prompts = ["guitar on red", "cat face"]
    ours = sample.TeacherSampler(teacher, 4, 3.0).draw(noise, teacher.encode(prompts))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = pipe(prompts, latents=noise[0], **options).images
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_the_embedded_classes_are_all_there():
    assert embedded.images().shape == (309, 3, 32, 32) and len(embedded.captions()) == 309
    assert sorted(i for group in embedded.classes() for i in group) == list(range(309))
