"""ImageReward (2304.05977), by its authors' package, which brings or fetches the weights itself;
beside a file of weights it wants med_config.json."""

from pathlib import Path

import torch

from support.cli import UserError, first_line, import_package
from support.pictures import to_pil
from support.weights import fingerprint

FLAGS = {
    "--image-reward": {
        "nargs": "?",
        "const": "ImageReward-v1.0",
        "metavar": "PATH",
        "help": "its file of weights, or what its package fetches (pip install image-reward)",
    }
}


class ImageReward:
    flag = "--image-reward"
    captions_needed = True

    def __init__(self, path, device):
        needed = "image-reward, OpenAI's clip and a transformers before 5"
        package = import_package("ImageReward", self.flag, needed)
        config = Path(path).parent / "med_config.json"
        beside = str(config) if Path(path).is_file() and config.is_file() else None
        try:
            self.network = package.load(str(path), device=str(device), med_config=beside)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--image-reward {path} is not on this machine and cannot be fetched: "
                f"{first_line(error)}. Where there is a network: hf download THUDM/ImageReward "
                "--local-dir DIR, then --image-reward DIR/ImageReward.pt"
            ) from None
        self.about = {"image reward": fingerprint(self.network)}

    def __call__(self, images, views, prompts):
        pairs = zip(prompts, images)
        scores = [self.network.score(prompt, to_pil(image)) for prompt, image in pairs]
        return {"image reward": torch.tensor(scores)}


def make(args, setting):
    if not args.image_reward:
        return []
    setting.require_captions("--image-reward")
    return [ImageReward(args.image_reward, args.device)]
