"""Train the demo model: a text-to-video DiT on captioned moving shapes, drawn on the fly.

    python examples/train_demo_model.py --out runs/demo                # a GPU if there is one, else all cores
    python examples/train_demo_model.py --out runs/demo --resume      # go on after an interruption
    python examples/train_demo_model.py --out runs/demo --export pab_kernels/models/demo   # write the package's weights

Stills first (the temporal blocks off), then clips and stills in turn. Muon for the blocks' matrices, AdamW for the
rest, a rate that falls to zero over the second half, and an exponential moving average of the weights. `--export`
checks every word on held-out captions, says which are followed, and puts the figures into the model card.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from training import average_into, export_average, load_checkpoint, optimisers, save_checkpoint, set_rates

from pab_kernels.models.demo import check, load, shapes
from pab_kernels.models.demo.network import CAPTION_CHANNELS, SCHEDULER_CONFIG, build_transformer
from pab_kernels.models.demo.pipeline import GUIDANCE
from pab_kernels.models.prompts import PromptTable


class Model(nn.Module):
    """Transformer and prompt table, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.prompts = PromptTable(shapes.VOCABULARY, CAPTION_CHANNELS)

    def initialise(self) -> None:
        """Small, even starting weights: sublayers begin with weak gates, the output with zero."""
        t = self.transformer
        for name, p in self.named_parameters():
            if p.ndim == 2 and "scale_shift_table" not in name and "slots" not in name:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for table in self.prompts.slots.values():
            nn.init.normal_(table.weight, std=1.0)
        nn.init.normal_(t.adaln_single.linear.weight, std=0.02)
        nn.init.zeros_(t.proj_out.weight)
        for block in [*t.transformer_blocks, *t.temporal_transformer_blocks]:
            nn.init.zeros_(block.scale_shift_table)
            block.scale_shift_table.data[[2, 5]] = 0.3
            if block.attn2 is not None:
                block.attn2.to_out[0].weight.data.mul_(0.3)

    def forward(self, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Predict v for clips `x` `[batch, 3, frames, H, W]` at timesteps `t` `[batch]` under captions `words` `[batch,
        slots]`."""
        return self.transformer(
            x,
            timestep=t,
            encoder_hidden_states=self.prompts(words),
            enable_temporal_attentions=x.shape[2] > 1,
            return_dict=False,
        )[0][:, :3]


def batch_of(step: int, rank: int, size: int, frames: int, pool: list[shapes.Caption], prompts: PromptTable):
    """The seeded batch of one step and rank: clips in [-1, 1], caption words with dropout."""
    seed = (step * 64 + rank) * 2 + (frames == 1)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    captions = rng.choices(pool, k=size)
    clips = shapes.render_batch(captions, generator, frames).permute(0, 2, 1, 3, 4) * 2 - 1
    words = prompts.indices(captions)
    words[torch.rand(size, generator=generator) < 0.1] = 0
    words[torch.rand(words.shape, generator=generator) < 0.05] = 0
    return clips, words, generator


def average_gradients(model: nn.Module, world: int) -> None:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def train(rank: int, args: argparse.Namespace) -> None:
    world = args.processes
    if world > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(args.port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = Model()
    model.initialise()
    average = Model().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    models = {"model": model.to(device), "average": average.to(device)}
    opts = optimisers(dict(model.named_parameters()), args.rate, args.matrix_rate)
    total = args.stills + args.clips
    checkpoint = Path(args.out) / "checkpoint.pt"
    start = load_checkpoint(checkpoint, models, opts, args.resume)
    betas = torch.linspace(
        SCHEDULER_CONFIG["beta_start"], SCHEDULER_CONFIG["beta_end"], SCHEDULER_CONFIG["num_train_timesteps"]
    )
    kept = (1 - betas).cumprod(0)
    excluded = set(shapes.held_out())
    pool = [c for c in shapes.captions() if c not in excluded]

    # On a CPU the fused attention's backward pass is slow for many short sequences.
    attention_backend = partial(sdpa_kernel, SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext

    bar = tqdm(total=total, initial=start, disable=rank != 0, mininterval=5, unit="step")
    smooth, saved_at = None, time.monotonic()
    try:
        for step in range(start, total):
            stills = step < args.stills or step % 2 == 1
            size, frames = (args.batch * 4, 1) if stills else (args.batch, shapes.FRAMES)
            x, words, generator = batch_of(step, rank, size // world, frames, pool, model.prompts)
            t = (torch.rand(len(x), generator=generator) + torch.arange(len(x))) / len(x)  # stratified
            if step < args.stills + 0.35 * args.clips:
                t = torch.where(
                    t < 0.25, 2 * t, (t + 0.5) / 1.5
                )  # three quarters in the noisier half: there the direction is decided
            else:
                t = torch.where(
                    t < 0.4, t / 0.4, 0.2 + (t - 0.4) * (0.65 / 0.6)
                )  # then more in the middle: there the shape is
            t = (t * len(kept)).long().clamp(max=len(kept) - 1)
            noise = torch.randn(x.shape, generator=generator)
            a = kept[t].view(-1, 1, 1, 1, 1)
            noised, target = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
            with torch.autocast(device.type, torch.bfloat16), attention_backend():
                v = model(noised.to(device), t.to(device), words.to(device))
            loss = (v.float() - target.to(device)).square().mean()
            loss.backward()
            if world > 1:
                average_gradients(model, world)
            set_rates(opts, [args.matrix_rate, args.rate], step, total)
            for opt in opts:
                opt.step()
            model.zero_grad(set_to_none=True)
            average_into(average, model, min(args.ema, (step + 1) / (step + 10)))
            value = float(loss.detach())
            smooth = value if smooth is None or step == args.stills else 0.98 * smooth + 0.02 * value
            bar.update()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            if rank == 0 and time.monotonic() - saved_at > 120:
                save_checkpoint(checkpoint, models, opts, step + 1)
                saved_at = time.monotonic()
    except KeyboardInterrupt:
        if rank == 0:
            save_checkpoint(checkpoint, models, opts, step)
            print(f"\ninterrupted: {checkpoint} holds step {step}; go on with --resume")
        return
    if rank == 0:
        save_checkpoint(checkpoint, models, opts, total)
    if world > 1:
        dist.destroy_process_group()


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights in float16, check them on the held-out captions, and put the figures into the model
    card."""
    folder = Path(args.export)
    card = folder / "README.md"
    weights = export_average(Path(args.out) / "checkpoint.pt", folder)

    drawn = check.check_data()
    if drawn.whole != drawn.clips:
        raise SystemExit(
            f"the checker misreads {drawn.clips - drawn.whole} of {drawn.clips} drawn clips: its figures would mean "
            "nothing"
        )
    demo = load(device=args.device, weights=weights)
    captions = shapes.held_out()
    with tqdm(total=len(captions), unit="clip") as bar:
        report = check.check_model(
            demo, captions, args.check_steps, args.check_guidance, progress=lambda done, total: bar.update(done - bar.n)
        )
    figures = check.describe(demo, report, args.check_steps, args.check_guidance)
    print(figures)
    if card.exists():
        card.write_text(check.fill_card(card.read_text(), figures))
        print(f"{card}: figures written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--export", metavar="FOLDER", help="do not train: write the checkpoint's weights there and check them"
    )
    parser.add_argument(
        "--check-steps", type=int, default=check.CHECK_STEPS, help="sampling steps of the check after --export"
    )
    parser.add_argument("--check-guidance", type=float, default=GUIDANCE, help="its scale of classifier-free guidance")
    parser.add_argument("--stills", type=int, default=1500, help="steps on single frames")
    parser.add_argument("--clips", type=int, default=6800, help="further steps, on clips and stills in turn")
    parser.add_argument("--batch", type=int, default=16, help="clips a step (four times as many stills)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=2.5e-3, help="learning rate of Muon")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--processes", type=int, default=1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // 1)
    )
    parser.add_argument("--threads", type=int, default=1, help="threads a process, with several processes")
    parser.add_argument("--port", type=int, default=29511)
    args = parser.parse_args()
    if args.export:
        export(args)
    elif args.processes > 1:
        mp.spawn(train, (args,), nprocs=args.processes)
    else:
        train(0, args)


if __name__ == "__main__":
    main()
