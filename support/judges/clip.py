"""CLIP score: cosine of image and text. 2104.08718"""

from pathlib import Path

import torch
import torch.nn.functional as F

from support.cli import UserError, first_line
from support.pictures import to_pil
from support.pipelines import find_on_hub, quiet_libraries
from support.protocols import square
from support.weights import fingerprint, load_pretrained

FLAGS = {
    "--clip": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "CLIP score: vit-b/32, vit-g/14, or a folder or hub id of a CLIP model",
    }
}
NAMES = {
    "vit-b/32": "openai/clip-vit-base-patch32",
    "vit-g/14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
}


class Clip:
    """As in DMD2's evaluation: the tokens of "A photo depicts" go between the start token and those
    of the caption, which itself was cut to the model's length; all of that is cut to the length
    again, and its last token is then the end token. The image is 256x256 (largest square, Lanczos)
    before CLIP's own resizing."""

    flag, prefix = "--clip", "A photo depicts "
    captions_needed = True

    def __init__(self, path, name, device):
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        quiet_libraries()
        try:
            find_on_hub(path)
            self.network = load_pretrained(CLIPModel, path).to(device, torch.float32).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(path)
            self.processor = CLIPImageProcessorPil.from_pretrained(path)
        except UserError:
            raise
        except Exception as error:  # of the network, of the hub, of the files
            raise UserError(
                f"{self.flag} {path} is not on this machine and cannot be fetched, or is no CLIP "
                f"model of transformers: {first_line(error)}. Where there is a network: hf "
                f"download {path} --local-dir DIR, then {self.flag} DIR"
            ) from None
        self.name, self.device = name, device
        self.length = self.network.config.text_config.max_position_embeddings
        self.about = {name: fingerprint(self.network)}

    def plain_tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def tokens(self, prompts):
        """input_ids (B, length) and their attention mask."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prefix, rows = self.plain_tokens(self.prefix), []
        for prompt in prompts:
            caption = self.plain_tokens(prompt)[: self.length - 2]
            row = [start, *prefix, *caption, end][: self.length]
            rows.append([*row[:-1], end])
        width = max(map(len, rows))
        ids = [row + [end] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def crop(self, image):
        return square(image, 256)

    @torch.no_grad()
    def cosine(self, images, prompts):
        ids, mask = self.tokens(prompts)
        seen = self.processor([self.crop(to_pil(image)) for image in images], return_tensors="pt")
        pixels = seen.pixel_values.to(self.device)
        output = self.network(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        return F.cosine_similarity(output.image_embeds, output.text_embeds, dim=1).cpu()

    def __call__(self, images, views, prompts):
        return {self.name: self.cosine(images, prompts)}


def make(args, setting):
    if args.clip:
        setting.require_captions("--clip")
    made = {}
    for path in args.clip or ():
        name = f"clip {Path(path).name if Path(path).is_dir() else path}"
        if name in made:
            raise UserError("--clip: two of these folders have the same name")
        made[name] = Clip(NAMES.get(path.lower(), path), name, args.device)
    return list(made.values())
