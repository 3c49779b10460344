"""The commands as a user runs them, bad input included."""

import json
import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import eval as evaluation
import fsdp
import sample
import train
from lab import faults, plane
from support import checkpoint, embedded, runlog
from support.networks import Networks
from tests.tiny import PLANE, SMALL, call, edit_json, refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the embedded teacher that the tests read, and must not change."""
    out = tmp_path_factory.mktemp("runs") / "four"
    call(train, f"{SMALL} --iterations 4 --out {out}")
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
    assert [row["iteration"] for row in rows] == [0, 4]  # shorter than ten iterations
    assert rows[0].keys() == {"iteration", "seconds", "fake_loss"}  # what later ones compare with
    assert {"fake_loss", "dm", "ca", "mean", "std", "gap", "cosine"} <= rows[1].keys()


def test_metrics_have_a_row_each_ten_iterations_and_the_rest(tmp_path):
    call(plane, f"{PLANE} --iterations 23 --out {tmp_path}/run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 10, 20, 23]


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
    flags = f"{PLANE} {VARIANTS[name].format(pairs=pairs)} --out {tmp_path}"
    call(plane, f"{flags}/whole --iterations 5")
    call(plane, f"{flags}/halves --iterations 3")
    call(plane, f"--resume {tmp_path}/halves --iterations 5")
    assert faults.same_state(tmp_path / "whole", tmp_path / "halves")


def test_a_damaged_checkpoint_is_passed_over(run, plane_run, capsys):
    (run / "checkpoints" / "000004" / "manifest.json").unlink()
    call(plane, f"--resume {run}")
    printed = capsys.readouterr().out
    assert "000004 is damaged" in printed and "checkpoints/000002" in printed
    assert faults.same_state(run, plane_run)


def test_flags_override_a_resumed_run_s_and_are_kept(run, capsys):
    call(plane, f"--resume {run} --iterations 6 --learning-rate 1e-5")
    printed = capsys.readouterr().out
    assert "changed: iterations was 4, is 6" in printed
    assert "changed: learning_rate was 0.001, is 1e-05" in printed
    config = json.loads((run / "config.json").read_text())
    assert config["learning_rate"] == 1e-5 and config["iterations"] == 6


def test_init_takes_student_and_fake_score_and_makes_the_rest_anew(plane_run, tmp_path, capsys):
    flags = f"--init {plane_run} --gan-weight 0.1 --out {tmp_path}/next --iterations 1"
    args = train.parse_arguments([f"@{plane.RECIPE}", *flags.split()])
    nets, _ = train.prepare(args, plane.load_model)
    assert "with a new head" in capsys.readouterr().out
    saved = faults.state_of(plane_run)
    for part, module in (("averaged_student", nets.student), ("fake_score", nets.fake_score)):
        for name, tensor in module.state_dict().items():
            if "head." not in name:
                assert torch.equal(tensor, saved[f"{part}.{name}"]), name
    assert not nets.student_optimizer.state and not nets.fake_optimizer.state


def test_a_run_without_a_checkpoint_begins_again(run, plane_run):
    shutil.rmtree(run / "checkpoints")
    call(plane, f"--resume {run}")
    assert faults.same_state(run, plane_run)


# ----------------------------------------------------------------------------- what goes wrong


def test_the_teacher_s_samples_are_drawn_once_and_fewer_where_it_is_slow(
    teacher, tmp_path, monkeypatch, capsys
):
    args = train.parse_arguments(f"{SMALL} --guidance 2 --dtype float32".split())
    nets = Networks(teacher, args)
    prompts = data.training_prompts(None, teacher)
    for name in ("whole", "few"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(runlog, "PATIENCE", 60)
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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_says_how_to_go_on(name, plane_run, tmp_path, capsys, monkeypatch):
    number, iterate = getattr(signal, name), train.iterate

    def interrupted(nets, batch, iteration, args):
        if iteration == 2:
            os.kill(os.getpid(), number)
        return iterate(nets, batch, iteration, args)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "iterate", interrupted)
        with pytest.raises(SystemExit) as end:
            call(plane, f"{PLANE} --iterations 4 --out {run}")
    assert end.value.code == 128 + number and (run / "checkpoints" / "000003").is_dir()
    assert f"go on with --resume {run}" in capsys.readouterr().out
    call(plane, f"--resume {run}")
    assert faults.same_state(run, plane_run)


def test_a_gradient_that_is_not_finite_keeps_a_good_student(tmp_path, monkeypatch):
    clip = fsdp.clip_gradients

    def spoiled(module, *rest):
        next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return clip(module, *rest)

    monkeypatch.setattr(fsdp, "clip_gradients", spoiled)
    says = refused(plane, f"{PLANE} --iterations 4 --out {tmp_path}/run", status=1)
    assert "--learning-rate LOWER" in says
    student = load_file(tmp_path / "run" / "student" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in student.values())


def test_a_health_metric_out_of_range_is_warned_of_once(tmp_path, capsys):
    flags = f"{PLANE} --learning-rate 0.05 --iterations 60 --save-every 60 --keep-going"
    call(plane, f"{flags} --out {tmp_path}/run")
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
    command, flags, says, finished, pairs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where there is no runs/decoupled
    (tmp_path / "empty.txt").write_text("\n \n")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert says in refused(command, flags.format(tmp=tmp_path, run=finished, pairs=pairs))
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


# ----------------------------------------------------------------------------- samples and numbers


def test_sample_draws_a_grid_of_several_students(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "other")
    flags = f"--compare {finished} {tmp_path}/other --prompts cat --teacher-steps 2"
    call(sample, f"{flags} --out {tmp_path}/grid.png --images {tmp_path}/images")
    assert Image.open(tmp_path / "grid.png").height > 4 * 128
    assert len(list((tmp_path / "images").iterdir())) == 4
    assert "x the speed" in capsys.readouterr().out


def test_a_student_of_the_old_format_is_drawn(finished, tmp_path):
    """Before the redesign config.json had other flags besides."""
    run = tmp_path / "old"
    shutil.copytree(finished / "student", run / "student")
    shutil.copy(finished / "config.json", run)
    others = {"picture_every": 100, "vae_device": None, "began": {"from": None, "launch": "x"}}
    edit_json(run / "config.json", **others)
    call(sample, f"--student {run} --prompts cat --teacher-steps 2 --out {run}/x.png")
    assert (run / "x.png").is_file()


def test_noise_depends_on_seed_step_and_column_alone(teacher):
    many = sample.column_noise(teacher, 4, 3, seed=1)
    assert torch.equal(many[:2, 2:3], sample.column_noise(teacher, 1, 3, seed=1, first=2)[:2])
    assert not torch.equal(many, sample.column_noise(teacher, 4, 3, seed=2))


def test_eval_writes_every_number_with_its_error_and_goes_on(finished, tmp_path, capsys):
    out = tmp_path / "evaluation"
    flags = f"--student {finished} --samples 4 --teacher-steps 2 --steps 1 --no-coverage"
    call(evaluation, f"{flags} --out {out}")
    report = json.loads((out / "metrics.json").read_text())
    labels = [row["label"] for row in report["rows"]]
    assert labels[0] == "teacher, 2 steps, guidance 7.5" and labels[-1] == "real images"
    assert all("alignment" in row and "frechet" in row for row in report["rows"])
    table = capsys.readouterr().out.split("WARNING")[0]
    assert max(map(len, table.splitlines())) <= 100
    parts = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    call(evaluation, f"{flags} --out {out}")
    assert parts == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert json.loads((out / "metrics.json").read_text())["rows"] == report["rows"]


def test_eval_draws_a_curve_over_a_run_s_checkpoints(finished, tmp_path):
    folders = " ".join(map(str, sorted((finished / "checkpoints").iterdir())))
    flags = f"--compare {folders} --samples 4 --teacher-steps 2 --no-coverage"
    call(evaluation, f"{flags} --out {tmp_path}/e")
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
