"""What pictures are judged by: Inception features, CLIP, PickScore, ImageReward, the embedded set, gauges that need no network; and the
protocols that say which pictures, how many, and how they are cut and resized before a network sees them.

A judge is called with a batch of pictures [(3, H, W), ...] in [0, 1], as they were drawn, with their protocol's views
{"whole": (B, 3, h, w), ...}, and with their prompts; it gives {name: (B, ...)}, something for each picture. What is said of all of them
together is computed from that, in eval.py. Judges lie in evaluation mode on one device; `about` says what they are, checksums of weights
included.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
import data
import models
from errors import UserError


# ---------------------------------------------------------------------------------------------------- protocols

def centre_crop(picture, size):
    """The square around the centre, in PIL's picture."""
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def square(size):
    """The largest square around the centre, resized by Lanczos: what DMD2's COCO evaluation does before anything else."""
    return lambda picture: centre_crop(picture, min(picture.size)).resize((size, size), Image.Resampling.LANCZOS)


def patch(size):
    """The square of that many pixels around the centre; a smaller picture whole, resized to that, as clean-fid goes on with it."""
    small = lambda picture: to_pil(clean_resize(from_pil(picture)[None], size)[0] / 255)
    return lambda picture: centre_crop(picture, size) if min(picture.size) >= size else small(picture)


@dataclass
class Protocol:
    """samples: how many. size: of the pictures that a model has to draw; None takes any. views: {name: what is done to a picture (PIL -> PIL),
    None for nothing}; of each there are Inception features, and the first is what gauges and the embedded set see. resize: how Inception
    gets to 299 pixels. reference: how many pictures samples are compared with. published: numbers that compare with what it gives."""
    samples: int
    size: int | None
    views: dict
    resize: str
    about: str
    prompts: str = "a file"
    reference: int | None = None
    published: str = ""


# What the papers report, as their released code computes it. Each text says what is the same and what cannot be.
PROTOCOLS = {
    "imagenet64-50k": Protocol(50_000, 64, {"whole": None}, "tensorflow", prompts="labels", reference=1_281_167,
                               published="one step: DMD2 FID 1.51, 1.28 resumed, 2.61 without a GAN; f-distill (JS) 1.16", about=(
        "50,000 samples of 64x64, sample i of label i mod 1000, compared as they are with the statistics of all 1,281,167 training "
        "pictures (EDM's fid-refs/imagenet-64x64.npz: mu and sigma of 2,048 Inception features). Sources: DMD2's "
        "main/edm/test_folder_edm.py (labels in turn) and EDM's fid.py (statistics, uint8 pictures, resizing inside the network). EDM's "
        "paper reports the least of three such numbers with different seeds; this is one.")),
    "coco30k-256": Protocol(30_000, 512, {"whole": square(256)}, "clean", reference=40_504,
                            published="SD1.5 in one step, guidance 1.75: DMD2 FID 9.28, 8.35 with a GAN; f-distill (JS) 7.42", about=(
        "30,000 captions of COCO 2014's validation set, one 512x512 picture each, in their order (DMD2's captions_coco14_test.pkl), "
        "compared with the 40,504 pictures of val2014. Both: largest square around the centre, Lanczos to 256, then clean-fid's resizing "
        "(bicubic, float, channel by channel) to 299; here that is rounded to whole numbers, since torch-fidelity's network takes no "
        "others, and pixels are rounded to 8 bits, where DMD2 cuts them off. CLIP score of the same 256 pixels. Sources: DMD2's "
        "main/test_folder_sd.py, main/coco_eval/coco_evaluator.py, experiments/sdv1.5/README.md.")),
    "coco10k-512": Protocol(10_000, 1024, {"whole": square(512), "patch": patch(299)}, "clean",
                            published="SDXL in four steps: DMD2 FID 19.32, patch FID 20.86, CLIP .332; decoupled DMD FID 17.80, CLIP .336",
                            about=(
        "10,000 captions of COCO 2014 (DMD2's coco10k/all_prompts.pkl), one 1024x1024 picture each, compared with coco10k/subset. FID: "
        "largest square around the centre, Lanczos to 512, clean-fid's resizing to 299, rounded. Patch FID: 299x299 pixels around the "
        "centre of the picture as it was drawn, and of the reference as it lies on disk. CLIP score: of the picture as it was drawn, "
        "largest square, Lanczos to 256. Sources: DMD2's main/sdxl/test_folder_sdxl.py, main/coco_eval/coco_evaluator.py, "
        "experiments/sdxl/README.md.")),
    "emoji": Protocol(300, 64, {"whole": None}, "tensorflow", prompts="captions", about=(
        "full captions of the embedded set, drawn without replacement by the seed; judged by the set itself")),
    "emoji-classes": Protocol(1000, 16, {"whole": None}, "tensorflow", prompts="labels", about=(
        "the ten classes of the embedded class-conditional teacher in turn; judged by their pictures")),
    "as-is": Protocol(1000, None, {"whole": None}, "tensorflow", about="pictures as they are; Inception resizes inside the network"),
}


def to_pil(picture):
    """(3, H, W) in [0, 1] -> PIL."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())


def from_pil(picture):
    """PIL -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1) / 255


def refuse_sizes(sizes):
    two = " and ".join(f"{w}x{h}" for h, w in sorted(sizes)[:2])
    raise UserError(f"pictures of several sizes, such as {two}, are compared as they are: resize them, or name a --protocol that does")


def views_of(pictures, protocol):
    """[(3, H, W), ...] in [0, 1] -> {view: (B, 3, h, w)}. Raises UserError where pictures are compared as they are and have several sizes, or
    another than the protocol's."""
    size, seen = protocol.size, {}
    if size and None in protocol.views.values():
        wrong = next((picture.shape for picture in pictures if tuple(picture.shape[1:]) != (size, size)), None)
        if wrong:
            raise UserError(f"a picture has {wrong[2]}x{wrong[1]} pixels; this protocol compares pictures of {size}x{size} as they are")
    for name, change in protocol.views.items():
        changed = [picture if change is None else from_pil(change(to_pil(picture))) for picture in pictures]
        sizes = {tuple(picture.shape[1:]) for picture in changed}
        if len(sizes) > 1:
            refuse_sizes(sizes)
        seen[name] = torch.stack(changed)
    return seen


def about(judges):
    """What they say of themselves, together."""
    return {name: value for judge in judges for name, value in judge.about.items()}


# ---------------------------------------------------------------------------------------------------- Inception

# The weights that FID is defined by: Inception of 2015-12-05, as torch-fidelity converted it. The name ends in the beginning of its SHA-256.
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def import_fidelity(what):
    try:
        import torch_fidelity.feature_extractor_inceptionv3
        return torch_fidelity
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
        missing = isinstance(error, ModuleNotFoundError)
        trouble = "is not installed" if missing else f"cannot be imported ({models.first_line(error)})"
        raise UserError(f"{what} needs a package that {trouble}: pip install torch-fidelity torchvision") from None


def clean_resize(pictures, size=299):
    """clean-fid's (2104.11222): each channel as float32, PIL's bicubic filter with antialiasing. (B, 3, H, W) in [0, 1] -> (B, 3, 299, 299)
    in [0, 255]."""
    def channel(values):
        return torch.from_numpy(np.asarray(Image.fromarray(values.numpy(), "F").resize((size, size), Image.Resampling.BICUBIC)).copy())

    bytes_ = (pictures.cpu() * 255).round()
    return torch.stack([torch.stack([channel(values) for values in picture]) for picture in bytes_]).clamp(0, 255)


class Inception:
    """2,048 features and 1,008 logits of torch-fidelity's network, which is that of TensorFlow to rounding."""

    def __init__(self, path, resize, device):
        fidelity = import_fidelity("--inception")
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no file of Inception weights at {path}: curl -LO {INCEPTION_URL}, then --inception {Path(INCEPTION_URL).name}")
        models.read_weights(path, "the Inception network")  # of which nothing is executed; torch-fidelity does not look before it loads
        make = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
        try:
            self.network = make("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        except (RuntimeError, KeyError) as error:
            raise UserError(f"--inception {path} is no Inception network of torch-fidelity: {models.first_line(error)}") from None
        self.network, self.resize, self.device = self.network.to(device), resize, device
        digest = checkpoint.digest(path)
        self.published = digest.startswith(Path(INCEPTION_URL).stem.rsplit("-", 1)[-1])
        self.about = {"inception": digest, "resize": resize}

    @torch.no_grad()
    def __call__(self, pictures, views, prompts):
        found = {}
        for name, seen in views.items():
            seen = clean_resize(seen) if self.resize == "clean" else seen * 255
            features, logits = self.network(seen.round().to(torch.uint8).to(self.device))
            found |= {f"features {name}": features.cpu(), f"logits {name}": logits.cpu()}
        return found


# ---------------------------------------------------------------------------------------------------- CLIP and its kin

CLIP_NAMES = {"vit-b/32": "openai/clip-vit-base-patch32", "vit-g/14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"}
PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_PREFIX = "A photo depicts "


def find_on_hub(path):
    """Ask once for what is neither a folder nor fetched already: the libraries would go on asking for a minute."""
    import huggingface_hub
    if not Path(path).is_dir() and not isinstance(huggingface_hub.try_to_load_from_cache(path, "config.json"), str):
        try:
            huggingface_hub.model_info(path, timeout=10)
        except Exception as error:  # of the network, of the hub, of the name
            raise OSError(f"the hub does not know it or cannot be reached ({models.first_line(error)[:100]})") from None


class Clip:
    """Cosine of picture and text, with a CLIP model of transformers. 2104.08718

    As in DMD2's evaluation: the tokens of "A photo depicts" go between the start token and those of the caption, which itself was cut to
    the model's length; all of that is cut to the length again, and its last token is then the end token. The picture is 256x256 (largest
    square, Lanczos) before CLIP's own resizing.
    """

    flag, prefix = "--clip", CLIP_PREFIX
    square = staticmethod(square(256))

    def __init__(self, path, name, device):
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        try:
            find_on_hub(path)
            with models.quiet_libraries():
                self.network = CLIPModel.from_pretrained(path).to(device, torch.float32).eval()
                self.tokenizer, self.processor = CLIPTokenizer.from_pretrained(path), CLIPImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, models.SafetensorError) as error:
            raise UserError(f"{self.flag} {path} is not on this machine and cannot be fetched, or is no CLIP model of transformers: "
                            f"{models.first_line(error)}. Where there is a network: hf download {path} --local-dir DIR, then "
                            f"{self.flag} DIR") from None
        self.name, self.device, self.length = name, device, self.network.config.text_config.max_position_embeddings
        self.about = {name: models.fingerprint(self.network)}

    def tokens(self, prompts):
        """input_ids (B, length) and their attention mask."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        plain = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids
        prefix, rows = plain(self.prefix), []
        for prompt in prompts:
            row = [start, *prefix, *plain(prompt)[:self.length - 2], end][:self.length]
            rows.append([*row[:-1], end])
        width = max(map(len, rows))
        ids = torch.tensor([row + [end] * (width - len(row)) for row in rows], device=self.device)
        return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)

    def look(self, pictures):
        """[(3, H, W), ...] in [0, 1] -> pixel_values as the network takes them."""
        return self.processor([self.square(to_pil(picture)) for picture in pictures], return_tensors="pt").pixel_values.to(self.device)

    @torch.no_grad()
    def cosine(self, pictures, prompts):
        ids, mask = self.tokens(prompts)
        output = self.network(input_ids=ids, attention_mask=mask, pixel_values=self.look(pictures))
        return F.cosine_similarity(output.image_embeds, output.text_embeds, dim=1).cpu()

    def __call__(self, pictures, views, prompts):
        return {self.name: self.cosine(pictures, prompts)}


class PickScore(Clip):
    """PickScore (2305.01569): the cosine of a CLIP-H trained on preferences, times its logit scale, as its model card says. No prefix; the
    whole picture."""

    flag, prefix = "--pickscore", ""
    square = staticmethod(lambda picture: picture)

    def __call__(self, pictures, views, prompts):
        return {self.name: self.network.logit_scale.exp().item() * self.cosine(pictures, prompts)}


class ImageReward:
    """ImageReward (2304.05977), by its authors' package, which brings or fetches the weights itself; beside a file of weights it wants
    med_config.json."""

    flag = "--image-reward"

    def __init__(self, path, device):
        try:
            import ImageReward as package
        except ImportError as error:
            raise UserError(f"--image-reward needs a package that is not installed or cannot be imported ({models.first_line(error)}): "
                            "pip install image-reward, which itself needs OpenAI's clip and a transformers before 5") from None
        config = Path(path).parent / "med_config.json"
        try:
            beside = str(config) if Path(path).is_file() and config.is_file() else None
            self.network = package.load(str(path), device=str(device), med_config=beside)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"--image-reward {path} is not on this machine and cannot be fetched: {models.first_line(error)}. Where there is a "
                            "network: hf download THUDM/ImageReward --local-dir DIR, then --image-reward DIR/ImageReward.pt") from None
        self.about = {"image reward": models.fingerprint(self.network)}

    def __call__(self, pictures, views, prompts):
        scores = [self.network.score(prompt, to_pil(picture)) for prompt, picture in zip(prompts, pictures)]
        return {"image reward": torch.tensor(scores)}


# ---------------------------------------------------------------------------------------------------- gauges

class Gauges:
    """What needs no network. mean and deviation of a picture's values; saturation, the mean over pixels of the largest less the smallest
    colour; and a thumbnail of 32x32, by which pictures of one prompt are compared. An over-saturated student shows in deviation and
    saturation, a collapsed one in the thumbnails."""

    about = {}

    def __call__(self, pictures, views, prompts):
        seen = next(iter(views.values())).cpu()
        small = F.adaptive_avg_pool2d(seen, min(32, *seen.shape[-2:]))
        return {"mean": seen.mean((1, 2, 3)), "deviation": seen.flatten(1).std(dim=1),
                "saturation": (seen.amax(1) - seen.amin(1)).mean((1, 2)),
                "thumbnail": (small * 255).round().to(torch.uint8), "size": torch.tensor([seen.shape[-2:]] * len(seen))}


# ---------------------------------------------------------------------------------------------------- the embedded set

EDGE_WEIGHT = 4.0  # edges are weaker than colours; times 4 both count alike


def centred(pictures, size=32):
    """(N, 3, H, W) in [0, 1] -> (N, 3, size, size): the square around the ink, so that where and how large it is does not
    count. The square spans all but the outer 1 % of the ink on each side, lest a speck decide."""
    ink = (pictures.amin(1) < 0.7).float()
    bounds = []
    for along in (2, 1):  # what is left is y first, x then
        mass = ink.sum(along).cumsum(1)
        low = (mass < 0.01 * mass[:, -1:]).sum(1)
        high = (mass < 0.99 * mass[:, -1:]).sum(1) + 1
        bounds.append((low, torch.maximum(high, low + 1)))
    (top, bottom), (left, right) = bounds
    side = torch.maximum(bottom - top, right - left).clamp(max=pictures.shape[-1])
    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side / pictures.shape[-1]
    theta[:, 0, 2] = (left + right) / pictures.shape[-1] - 1
    theta[:, 1, 2] = (top + bottom) / pictures.shape[-2] - 1
    grid = F.affine_grid(theta, (len(pictures), 3, size, size), align_corners=False)
    return 1 - F.grid_sample(1 - pictures, grid, align_corners=False)


def cell_features(pictures, cells):
    """(N, 3, H, W) in [0, 1] -> (N, 5 cells^2): mean colour, and mean strength of edges either way, in cells x cells squares."""
    right = F.pad(pictures, (0, 1, 0, 0), mode="replicate").diff(dim=3).abs().mean(1, keepdim=True)
    below = F.pad(pictures, (0, 0, 0, 1), mode="replicate").diff(dim=2).abs().mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(torch.cat([pictures, EDGE_WEIGHT * right, EDGE_WEIGHT * below], 1), cells).flatten(1)


def layout(pictures):
    """Features of 4x4 cells, (N, 3, H, W) -> (N, 80), in units of 1/10 of the grey range."""
    return 10 * cell_features(pictures, 4)


class EmojiJudge:
    """The embedded set as a yardstick, for pictures of `size` pixels. With classes the prompts are their numbers, else words."""

    about = {}

    def __init__(self, size=64, classes=None):
        self.captions = [caption for _, caption in data.emoji_captions()]
        self.words = [set(caption.split()) for caption in self.captions]
        self.classes, self.width = classes, data.CLASS_WIDTH if classes else 1.0
        self.known = [i for group in classes for i in group] if classes else list(range(len(self.captions)))
        self.pictures = data.emoji_pictures(2 * size)                                                 # (1453, 3, 2 size, 2 size)
        self.appearance = cell_features(centred(F.avg_pool2d(self.pictures[self.known].float() / 255, 2)), 8)

    @functools.cache
    def accepted(self, prompt):
        """The pictures of the set that are right for a prompt."""
        found = []
        if self.classes:
            found = self.classes[int(prompt)] if prompt.isdecimal() and int(prompt) < len(self.classes) else []
        elif prompt:
            words = set(prompt.split())
            found = [i for i, own in enumerate(self.words) if words <= own]
        if not found:
            right = f"the classes 0 to {len(self.classes) - 1}" if self.classes else "words of its captions"
            raise UserError(f"nothing in the embedded set is right for the prompt {prompt!r}: prompts are {right}")
        return found

    def real(self, prompts, seed):
        """Real pictures (N, 3, size, size) in [0, 1], at random places and sizes, of prompts; a full caption's own."""
        generator = torch.Generator().manual_seed(seed)
        own = {caption: i for i, caption in enumerate(self.captions)}
        pick = lambda accepted: accepted[int(torch.rand((), generator=generator) * len(accepted))]
        index = [own[prompt] if prompt in own and not self.classes else pick(self.accepted(prompt)) for prompt in prompts]
        return (data.shift_and_scale(self.pictures[index], torch.Generator().manual_seed(seed), self.width) + 1) / 2

    def reference(self):
        """Layout features that samples are compared with: of the whole set, or of 200 pictures of each class."""
        prompts = [str(number) for number in range(len(self.classes)) for _ in range(200)] if self.classes else self.captions
        return layout(self.real(prompts, seed=0))

    def nearest(self, pictures):
        """Index of the nearest picture of the set, for each, by mean colour and edge strength in 8x8 cells of the square around the ink."""
        found = torch.cdist(cell_features(centred(pictures), 8), self.appearance).argmin(1)
        return torch.tensor(self.known)[found]

    def __call__(self, pictures, views, prompts):
        seen = next(iter(views.values())).cpu()
        nearest = self.nearest(seen)
        right = torch.tensor([i in self.accepted(prompt) for i, prompt in zip(nearest.tolist(), prompts)])
        return {"nearest": torch.where(right, nearest, -1), "features layout": layout(seen)}
