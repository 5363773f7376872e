"""Image CLIP in miniature: learns the toy's objects from captioned still images, and nothing of its actions.

Real CLIP has seen 400 million images with what people wrote under them; it knows what things are, where and how they
stand, and little of what they do. This script makes the same kind of model for the toy, with the same symmetric
contrastive loss (arXiv 2103.00020, figure 3), and writes `toy/tiny.pt`:

    python -m toy.pretrain          about seven minutes on two CPU cores

The captions say more than what is there ("a red ball on the left by a pink wall", "a photo of a blue cone tilted."):
with captions that name the object alone, the image encoder has no reason to keep anything else and fine-tuning on
videos stalls. The many things that they say, of any object, also teach the text encoder to combine words, which is what
makes classes recognisable that are not in the training videos.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

import clip
from toy import draw

DIMENSIONS = dict(embed_dim=128, image_size=64, patch_size=16, vision_width=128, vision_layers=3, context_length=77,
                  vocab_size=clip.TINY_VOCABULARY, text_width=128, text_layers=3)
POSES = ("on the left", "on the right", "at the top", "at the bottom", "that is small", "that is large", "tilted",
         "upside down")


def captioned_image(rng):
    """One still image, uint8 [3, HEIGHT, WIDTH], and a caption that names the object and one or two more things: where
    it is, its size, how it stands, the colour of the floor or the wall; or there is no object."""
    name, pose = rng.choice(draw.OBJECTS), rng.choice((*POSES, "", "nothing"))
    x, y = rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)
    size, angle = rng.uniform(0.15, 0.25), rng.uniform(-0.3, 0.3)
    far, side = rng.uniform(0.15, 0.42), rng.choice((-1, 1))
    if pose in ("on the left", "on the right"):
        x = far if pose == "on the right" else -far
    elif pose in ("at the top", "at the bottom"):
        y = far if pose == "at the bottom" else -far
    elif pose in ("that is small", "that is large"):
        size = rng.uniform(0.28, 0.4) if pose == "that is large" else rng.uniform(0.05, 0.12)
    elif pose in ("tilted", "upside down"):
        angle = side * (rng.uniform(2, np.pi) if pose == "upside down" else rng.uniform(0.5, 2))
    room = draw.scene(rng)
    image = draw.render(name, [x], [y], [size], [angle], [pose != "nothing"], room)[0]
    subject = pose if pose == "nothing" else f"a {name} {pose}".strip()
    where = rng.choice(("", "", f" on a {draw.shade(room['floor'])} floor", f" by a {draw.shade(room['wall'])} wall"))
    caption = subject + where
    return image.transpose(2, 0, 1), f"a photo of {caption}." if rng.uniform() < 0.5 else caption


def batch(size, rng):
    images, captions = zip(*(captioned_image(rng) for _ in range(size)))
    images = torch.from_numpy(np.stack(images))
    return center_crop(resize(images, [73], antialias=True), [64]), list(captions)


def main():
    """Trains the tiny CLIP and saves its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(clip.MODELS["tiny"]), help="file (default: toy/tiny.pt)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = clip.CLIP(**DIMENSIONS)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)))
    same = torch.arange(args.batch_size)
    bar = tqdm(range(args.steps))
    for _ in bar:
        images, captions = batch(args.batch_size, rng)
        logits = model.logits(model.encode_image(images), model.encode_text(model.tokenizer(captions)))
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.0f}")
    torch.save({name: value.half() for name, value in model.state_dict().items()}, args.out)

    with torch.no_grad():
        images, captions = batch(2000, rng)
        named = [(i, k) for i, caption in enumerate(captions) for k, name in enumerate(draw.OBJECTS) if name in caption]
        shown, truth = (torch.tensor(column) for column in zip(*named))
        text = model.encode_text(model.tokenizer([f"a {name}" for name in draw.OBJECTS]))
        right = model.logits(model.encode_image(images[shown]), text).argmax(-1) == truth
    print(f"names the object in {right.float().mean():.1%} of {len(named)} new images")


if __name__ == "__main__":
    main()
