"""PickScore (2305.01569): the cosine of a CLIP-H trained on preferences, times its logit scale, as
its model card says. No prefix; the whole image."""

from support.judges.clip import Clip

FLAGS = {
    "--pickscore": {
        "nargs": "?",
        "const": "yuvalkirstain/PickScore_v1",
        "metavar": "PATH",
        "help": "folder or hub id (default yuvalkirstain/PickScore_v1)",
    }
}


class PickScore(Clip):
    flag, prefix = "--pickscore", ""

    def crop(self, image):
        return image

    def __call__(self, images, views, prompts):
        scale = self.network.logit_scale.exp().item()
        return {self.name: scale * self.cosine(images, prompts)}


def make(args, setting):
    if not args.pickscore:
        return []
    setting.require_captions("--pickscore")
    return [PickScore(args.pickscore, "pickscore", args.device)]
