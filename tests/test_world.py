"""The embedded world: captions say what scenes show, the judge reads it, the makers make both."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import Lumina2Pipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import data
import eval as evaluation
import models
import sample
from lab import make_flow, make_judge, make_world
from support import world
from support.cli import UserError
from support.images import as_tensor
from support.judges import world as judge_file
from support.judges.world import CATEGORIES, WorldJudge, is_right
from support.pictures import to_pil


def numbers(count, seed=0):
    return torch.rand(count, world.NUMBERS, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def judge():
    return WorldJudge()


def test_a_prompt_is_read_as_it_was_written():
    assert len(world.names()) == len(set(world.names())) == len(world.objects()) == world.OBJECTS
    for u in numbers(2000):
        prompt = world.draw_prompt(u)
        assert world.read_prompt(str(prompt)) == prompt
    wrong = ["", "no such thing", "cat face on mauve", "cat face below rainbow", "cat face and"]
    for text in [*wrong, "cat face and cat face"]:
        with pytest.raises(UserError, match="the embedded world has no scene") as error:
            world.read_prompt(text)
    examples = re.findall(r"'([^']+)'", str(error.value).split("prompts are like")[1])
    assert len([world.read_prompt(example) for example in examples]) == 3


def test_pairs_that_are_held_out_are_drawn_where_they_are_asked_for_and_nowhere_else():
    share = sum(world.held_out(i, j) for i in range(world.OBJECTS) for j in range(i))
    share /= world.OBJECTS * (world.OBJECTS - 1) / 2
    assert share == pytest.approx(1 / world.HELD_OUT, rel=0.1)
    for unseen in (False, True):
        for u in numbers(1000):
            pair = world.draw_prompt(u, alone=0.0, unseen=unseen).objects
            assert pair[0] != pair[1]
            assert world.held_out(*pair) == world.held_out(*reversed(pair)) == unseen


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_objects_stand_where_the_caption_says_and_do_not_overlap(relation):
    turned = set()
    for u in numbers(500):
        (x, y, edge), (other_x, other_y, other_edge) = world.place_two(relation, u)
        for low, size in ((x, edge), (y, edge), (other_x, other_edge), (other_y, other_edge)):
            assert 0 <= low <= low + size <= world.SIZE
        gaps = {
            "left of": other_x - x - edge,
            "right of": x - other_x - other_edge,
            "above": other_y - y - edge,
            "below": y - other_y - other_edge,
        }
        turned |= {name for name, gap in gaps.items() if gap >= 0}
        assert max(gaps.values()) >= 0
    assert turned == (set(gaps) if relation == "and" else {relation})


def test_scenes_follow_from_the_numbers_and_prompts_are_shortened_as_they_say():
    prompts = world.prompts(20, torch.Generator().manual_seed(0))
    one, two = (world.scenes(prompts, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (20, 3, 64, 64) and one.dtype == torch.uint8
    prompt = world.read_prompt("cat face above rainbow on blue")
    texts = [world.shorten(prompt, u) for u in numbers(4000)]
    assert texts.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    kinds = {"cat face above rainbow on blue", "cat face above rainbow", "cat face and rainbow"}
    assert {*kinds, "cat face and rainbow on blue", ""} == set(texts)


# ----------------------------------------------------------------------------- the judge


def test_the_judge_is_right_about_real_scenes_and_sees_what_is_wrong(judge):
    prompts = judge.prompts(200, seed=3)
    images = judge.real(prompts, seed=4)
    found = judge(images, {"whole": images}, prompts)
    metrics = judge.metrics(found["kind"] >= 0, prompts)
    assert set(metrics) == {"alignment", *CATEGORIES}
    assert min(metric.value for metric in metrics.values()) > 0.97
    others = [*prompts[5:], *prompts[:5]]  # of the same category
    kinds = judge(images, {"whole": images}, others)["kind"].tolist()
    asked = [set(world.read_prompt(text).objects) for text in prompts]
    wrong = [kinds[i] for i in range(200) if set(world.read_prompt(others[i]).objects) != asked[i]]
    assert len(wrong) > 180 and max(wrong) == -1
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert (judge(noise, {"whole": noise}, prompts)["kind"] >= 0).float().mean() < 0.05


def test_what_is_right_of_a_scene_that_was_read():
    cat, rainbow = (world.names().index(name) for name in ("cat face", "rainbow"))
    found = {cat: (3.0, 8.0), rainbow: (11.0, 9.0)}
    right = {
        "cat face left of rainbow": True,
        "rainbow left of cat face": False,
        "cat face above rainbow": False,
        "cat face and rainbow on blue": True,
        "cat face and rainbow on red": False,
        "cat face": False,
        "cat face and sailboat": False,
    }
    for text, expected in right.items():
        assert is_right(world.read_prompt(text), found, "blue") == expected, text


def test_colours_are_told_where_they_are_plain():
    for u, colour in zip(numbers(50), list(world.COLOURS) * 5):
        prompt = world.Prompt((0,), None, colour)
        image = as_tensor(world.compose(prompt, u)[0]) / 255
        ground = torch.zeros(16, 16, dtype=torch.bool)
        (x, y, edge), *_ = world.place_one(u)
        for row in range(16):
            for column in range(16):
                across = 4 * column + 4 <= x or 4 * column >= x + edge
                ground[row, column] = across or 4 * row + 4 <= y or 4 * row >= y + edge
        if ground.sum() >= judge_file.LEAST_CELLS:
            assert judge_file.colour_of(image, ground) == colour
    graded = torch.linspace(0, 1, 64).view(1, 64, 1).expand(3, 64, 64)
    assert judge_file.colour_of(graded, torch.ones(16, 16, dtype=torch.bool)) is None


def test_kinds_of_open_prompts_differ_by_place_and_background(judge):
    (prompt,) = {world.read_prompt("guitar")}
    assert set(judge_file.OPEN) <= set(world.names())
    images = world.scenes([prompt] * 300, torch.Generator().manual_seed(0)).float() / 255
    kinds = judge(images, {"whole": images}, ["guitar"] * 300)["kind"]
    assert kinds.min() >= 0 and kinds.max() < judge.kinds("guitar")
    assert len(kinds.unique()) > 25


def test_evaluation_of_a_folder_of_scenes(judge, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    prompts = judge.prompts(50, seed=5)
    lines = []
    for i, image in enumerate(judge.real(prompts, seed=6)):
        to_pil(image).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": prompts[i]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    evaluation.main(["--protocol", "world", "--images", str(folder), "--out", str(out)])
    (row,) = json.loads((out / "metrics.json").read_text())["rows"]
    assert all(row[name]["value"] == 1 for name in CATEGORIES)
    assert row["frechet"]["value"] > 0


# ----------------------------------------------------------------------------- makers


def test_the_maker_of_the_judge_makes_one_that_loads(tmp_path, monkeypatch, capsys):
    for file in (judge_file, make_judge):
        monkeypatch.setattr(file, "WEIGHTS", tmp_path / "judge.safetensors")
    with pytest.raises(UserError, match="lab.make_judge makes it"):
        WorldJudge()
    flags = f"--iterations 2 --batch-size 4 --samples 10 --device cpu --work {tmp_path}"
    make_judge.main(flags.split())
    assert "single: " in capsys.readouterr().out
    prompt = world.read_prompt("cat face above rainbow")
    image, places = world.compose(prompt, numbers(1)[0][6:])
    labels = make_judge.labels_of(prompt, places)
    above, below = ((labels == 1 + i).nonzero().float().mean(0) for i in prompt.objects)
    assert labels.shape == (16, 16) and above[0] < below[0] and isinstance(image, Image.Image)


def test_the_maker_of_the_teacher_resumes_and_writes_what_loads(tmp_path, monkeypatch, capsys):
    stages = ("autoencoder", "text", "object", "scene", "decoder")
    flags = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "teacher")]
    flags += ["--scenes", "40", "--batch-size", "8", "--device", "cpu"]
    for stage in stages:
        flags += [f"--{stage}-iterations", "2"]
    make_world.main(flags)
    capsys.readouterr()
    make_world.main(flags)
    assert "2/2" in capsys.readouterr().err  # every stage was there
    more = ["--init", str(tmp_path / "teacher"), "--work", str(tmp_path / "more")]
    make_world.main([*flags, *more, "--out", str(tmp_path / "again")])
    assert not (tmp_path / "more" / "objects.pt").exists()
    same = {}
    for part in ("vae", "unet"):
        name = Path(part) / "diffusion_pytorch_model.safetensors"
        one, two = (load_file(tmp_path / folder / name) for folder in ("teacher", "again"))
        for key in one:
            same.setdefault(key.split(".")[0], []).append(torch.equal(one[key], two[key]))
    assert all(same["encoder"]) and not any(map(all, (same["decoder"], same["up_blocks"])))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    image = pipe("cat face", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    model = models.load_model(tmp_path / "teacher")
    assert model.prediction == "v_prediction" and model.image_size == 64
    tokens = model.pipe.tokenizer([str(p) for p in world.prompts(500, torch.Generator())]).input_ids
    assert max(map(len, tokens)) <= make_world.MAX_TOKENS  # every word is a token
    check_data(model, "world", monkeypatch)


def test_the_maker_of_the_flow_teacher_writes_what_diffusers_draws_alike(tmp_path, monkeypatch):
    flags = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "flow")]
    flags += ["--text-iterations", "2", "--scene-iterations", "2", "--batch-size", "4"]
    make_flow.main([*flags, "--scenes", "40", "--device", "cpu"])
    model = models.load_model(tmp_path / "flow")
    assert model.prediction == "flow" and model.image_size == 64
    texts = ["cat face above rainbow", "guitar on blue", ""]
    cond = model.encode(texts)
    assert cond["encoder_attention_mask"].sum(1).tolist() == [5, 4, 1]  # without the instruction
    assert cond["encoder_attention_mask"].shape[1] == make_world.MAX_TOKENS  # not 256
    short = make_flow.encode_with_gemma(texts, model.pipe.text_encoder, model.pipe.tokenizer)
    x_t = torch.randn(3, *model.sample_shape)
    torch.testing.assert_close(model.denoiser(x_t, 500, cond), model.denoiser(x_t, 500, short))
    pipe = Lumina2Pipeline.from_pretrained(tmp_path / "flow", dtype=torch.float32)
    options = {"height": 64, "width": 64, "cfg_normalization": False, "output_type": "latent"}
    noise = sample.column_noise(model, 2, 1, 0)
    options |= {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise[0]}
    expected = pipe(texts[:2], **options).images
    drawn = sample.TeacherSampler(model, 4, 3.0).draw(noise, model.encode(texts[:2]))
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)
    check_data(model, "world-flow", monkeypatch)


def check_data(model, name, monkeypatch):
    """What students of it are trained on."""
    monkeypatch.setitem(data.EMBEDDED, name, Path(model.name))
    prompts = data.training_prompts(None, model)
    assert len(prompts.texts) == data.WORLD_PROMPTS
    found = [world.read_prompt(text) for text in prompts.texts[:2000]]
    pairs = [prompt.objects for prompt in found if prompt.relation]
    assert 900 < len(pairs) < 1100 and not any(world.held_out(*pair) for pair in pairs)
    real = data.real_data(model)
    draws = [data.Draws(0, index, 4) for index in (0, 1, 0)]
    (x, texts), (other, _), (again, same) = (real.draw(draw) for draw in draws)
    assert torch.equal(x, again) and texts == same and not torch.equal(x, other)
    matches = 0
    for i, caption in enumerate(real.captions):
        if caption == world.read_prompt(texts[0]):
            image = world.scenes([caption], torch.Generator().manual_seed(data.mix_seed(i, 0)))
            matches += torch.equal(model.encode_images(data.as_sample(image)), x[:1])
    assert matches == 1


def test_text_is_taught_at_the_last_tokens_of_names():
    """What a state tells is checked against the very words of its token."""
    tokenizer = make_world.make_tokenizer(make_world.texts())
    for u in numbers(200):
        prompt = world.draw_prompt(u)
        ids = tokenizer(str(prompt)).input_ids
        for column, number in make_world.named(prompt):
            word = tokenizer.decode(ids[column]).strip()
            name = [*world.names(), *world.COLOURS][number]
            assert word == name.split()[-1]
