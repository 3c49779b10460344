"""What a user adds from outside, as the README shows it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

import data
import losses
import models
import sample
import train
from lab import plane
from support.families import TRANSFORMER, Family
from tests import flows
from tests.tiny import call, open_in_diffusers, random_image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def shown(pattern):
    """The lines of the README that match, as code."""
    found = re.search(pattern, README, re.MULTILINE | re.DOTALL)
    return "\n".join(line.removeprefix("    ") for line in found[0].splitlines())


def test_a_divergence_is_one_line(tmp_path, monkeypatch):
    entry = eval("{" + shown(r'^    "chi2".*?$') + "\n}")
    monkeypatch.setattr(losses, "DIVERGENCES", losses.DIVERGENCES | entry)
    r = torch.linspace(0.2, 5, 20, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(((1 - r) ** 2 / r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(losses.DIVERGENCES["chi2"](r), r**2 * curvature)
    flags = "--divergence chi2 --gan-weight 0.1 --iterations 2 --batch-size 8"
    call(plane, f"{flags} --out {tmp_path}/run")


def test_a_schedule_of_noise_levels_is_one_line(tmp_path, monkeypatch):
    entry = eval("{" + shown(r'^    "reversed".*?$') + "}")
    monkeypatch.setattr(train, "SCHEDULES", train.SCHEDULES | entry)
    t_in = torch.full((2000,), 249)
    draws = data.Draws(0, 0, 2000)
    t_dm, t_ca = train.draw_levels("reversed", (0.0, 1.0), t_in, 1000, draws)
    assert t_dm.max() < 249 and t_ca.max() > 900
    flags = "--schedule reversed --guidance 1.5 --iterations 2 --batch-size 8"
    call(plane, f"{flags} --out {tmp_path}/run")


@pytest.fixture
def auraflow(tmp_path):
    """A tiny AuraFlow with random weights, on disk."""
    torch.manual_seed(0)
    tokenizer = flows.make_tokenizer(256)
    pipe = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=flows.make_t5(tokenizer, 32).eval(),
        vae=flows.make_vae(channels=4),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipe.save_pretrained(tmp_path / "auraflow")
    return tmp_path / "auraflow"


def test_a_model_family_is_one_row_and_two_short_functions(auraflow, tmp_path, monkeypatch):
    functions = shown(r"^    def call_auraflow.*?hidden_states\": text}$")
    row = shown(r'^    "AuraFlowPipeline".*?$')
    space = {"Family": Family, "TRANSFORMER": TRANSFORMER}
    exec(functions, space)
    monkeypatch.setattr(models, "FAMILIES", models.FAMILIES | eval("{" + row + "}", space))
    model = models.load_model(auraflow)
    assert model.prediction == "flow" and model.sample_shape == (4, 8, 8)

    # Our sampler at diffusers' levels draws what diffusers draws.
    pipe = open_in_diffusers(auraflow)
    prompts = ["red apple", "cat face"]
    noise = sample.column_noise(model, 2, 1, seed=0)
    x = sample.TeacherSampler(model, 4, 3.0).draw(noise, model.encode(prompts))
    options = {"height": 16, "width": 16, "guidance_scale": 3.0, "output_type": "latent"}
    sigmas = [1.0, 0.75, 0.5, 0.25]  # before the shift
    theirs = pipe(prompts, negative_prompt=["", ""], latents=noise[0], sigmas=sigmas, **options)
    torch.testing.assert_close(x, theirs.images, atol=1e-4, rtol=1e-4)

    # And it is distilled.
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = f"--model {auraflow} --prompts {tmp_path}/prompts.txt --variant decoupled"
    call(train, f"{flags} --iterations 2 --batch-size 2 --out {tmp_path}/run")
    assert (tmp_path / "run" / "student" / "config.json").is_file()


JUDGE = '''"""How red an image is."""

FLAGS = {"--redness": {"action": "store_true", "help": "measure it"}}


class Redness:
    about = {}

    def __call__(self, images, views, prompts):
        seen = next(iter(views.values()))
        return {"redness": (seen[:, 0] - seen[:, 1:].mean(1)).mean((1, 2))}


def make(args, setting):
    return [Redness()] if args.redness else []
'''


def test_a_judge_is_one_file(tmp_path):
    """In a copy of the program, run as a user runs it."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "support" / "judges" / "redness.py").write_text(JUDGE)
    (tmp_path / "seen").mkdir()
    random_image(8, 8, seed=0).save(tmp_path / "seen" / "a.png")
    words = [sys.executable, "eval.py", "--images", "seen", "--redness", "--device", "cpu"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "redness" in done.stdout
