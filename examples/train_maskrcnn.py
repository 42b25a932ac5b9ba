# SPDX-License-Identifier: BSD-3-Clause
"""Trains torchvision's Mask R-CNN with the operators of this package, on one process or many.

    python examples/train_maskrcnn.py                                   # one process
    torchrun --standalone --nproc-per-node 2 examples/train_maskrcnn.py # one machine, two processes
    torchrun ... examples/train_maskrcnn.py --coco /data/coco           # the real thing

Without ``--coco`` it makes a small data set of photographs (coco_photographs.py). A run that is
repeated, or interrupted and resumed, gives the same weights to the last bit. See README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Asked for by torch.use_deterministic_algorithms; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import coco_detection
import coco_photographs
import torch
import torch.distributed as dist
import torchvision
from coco_detection import CocoDetection, Order
from maskrcnn_model import build_model, compile_parts, distribute, weights_hash
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torchvision.models.detection import MaskRCNN
from tqdm import tqdm

import glimpse_ext

Arguments = argparse.Namespace

PHOTOGRAPHS = {
    "split": "train", "val_split": "val", "backbone": "resnet18", "channels": 64, "samples": 64,
    "min_size": [192], "max_size": 320, "epochs": 10, "lr": 1e-3, "warmup": 50,
}  # fmt: skip
COCO = {
    "split": "train2017", "val_split": "val2017", "backbone": "resnet50", "channels": 256,
    "samples": 512, "min_size": [640, 672, 704, 736, 768, 800], "max_size": 1333, "epochs": 26,
    "lr": 1e-4, "warmup": 1000,
}  # fmt: skip
LARGEST_GRADIENT = 5.0
# Arguments that may differ between a run and its continuation.
FREE = {
    "out", "coco", "photos", "workers", "threads", "resume", "save_every", "log_every",
    "stop_after", "pictures",
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Defaults in brackets are for photographs, then for --coco.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = {name: f"[{PHOTOGRAPHS[name]}, {COCO[name]}]" for name in COCO}
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/maskrcnn"), help="checkpoint, log, pictures")
    add("--coco", type=Path, help="a folder in COCO's layout; default: photographs, made here")
    add("--photos", type=Path, default=Path("out/photographs"), help="where those are made")
    add("--photo-counts", type=int, nargs=2, default=[240, 40], help="to train on, to validate on")
    add("--photo-size", type=int, nargs=2, default=[192, 256], help="height and width")
    add("--split", help=default["split"])
    add("--val-split", help=default["val_split"])
    add("--backbone", help=f"a ResNet of torchvision {default['backbone']}")
    add("--pretrained", action="store_true", help="ImageNet weights; torchvision downloads them")
    add("--channels", type=int, help=f"of the pyramid and the mask head {default['channels']}")
    add("--samples", type=int, help=f"boxes per picture and step {default['samples']}")
    add("--min-size", type=int, nargs="+", help=f"shorter side, any of {default['min_size']}")
    add("--max-size", type=int, help=f"longer side, at most {default['max_size']}")
    add("--epochs", type=int, help=default["epochs"])
    add("--batch", type=int, default=2, help="pictures per process and step")
    add("--lr", type=float, help=f"of AdamW {default['lr']}")
    add("--warmup", type=int, help=f"steps until then {default['warmup']}")
    add("--seed", type=int, default=0)
    add("--amp", action="store_true", help="bfloat16 where autocast has it")
    add("--compile", action="store_true", help="torch.compile of the parts that hold the work")
    add("--fsdp", action="store_true", help="shard weights (FSDP2) instead of copying them (DDP)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="of a process on the CPU; default: its share of the cores")
    add("--workers", type=int, default=0, help="processes that load pictures, per process")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--save-every", type=int, default=500, help="steps; besides the end of each epoch")
    add("--log-every", type=int, default=10, help="steps")
    add("--stop-after", type=int, help="leave after this step and save nothing, as if killed")
    add("--pictures", action="store_true", help="draw detections at the end of each epoch")
    preset = COCO if parser.parse_known_args(argv)[0].coco else PHOTOGRAPHS
    parser.set_defaults(**preset)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Place:
    """Where this process runs. One process alone is a group of one."""

    rank: int
    world: int
    local_rank: int
    device: torch.device


def join(args: Arguments) -> Place:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    # Objects and states travel by gloo, gradients on GPUs by NCCL.
    backend = "gloo"
    if args.device == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(args.threads or max(1, len(os.sched_getaffinity(0)) // neighbours))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return Place(dist.get_rank(), dist.get_world_size(), local_rank, device)


class Log:
    """One JSON object per line, to ``log.jsonl`` and standard output, on rank 0."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.file = None
        if place.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / "log.jsonl").open("a")

    def __call__(self, event: str, **values: Any) -> None:
        if self.file is not None:
            line = json.dumps({"event": event, **values}, default=str)
            print(line, file=self.file, flush=True)
            tqdm.write(line, file=sys.stdout)


# -------------------------------------------------------------------------------------- checkpoint


def random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@dataclass
class Run:
    """All that training changes, and where it is kept."""

    core: MaskRCNN
    model: nn.Module
    """The core for many processes."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    args: Arguments
    place: Place
    step: int = 0
    """Steps done. Epoch and position within it follow, since all processes do the same number."""

    @property
    def path(self) -> Path:
        return Path(self.args.out) / "checkpoint.pt"

    def identity(self) -> dict[str, Any]:
        """What must be the same for a continuation to be the same run."""
        kept = {k: str(v) for k, v in sorted(vars(self.args).items()) if k not in FREE}
        kept["processes"] = str(self.place.world)
        if self.place.device.type == "cpu":
            kept["threads"] = str(torch.get_num_threads())
        return kept

    def save(self) -> None:
        """Rank 0 writes another file and renames it: whoever is killed leaves a whole one."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(self.model, self.optimizer, options=options)
        states: list[Any] = [None] * self.place.world
        dist.all_gather_object(states, random_states(self.place.device))
        if self.place.rank == 0:
            content = {
                "model": weights,
                "optimizer": moments,
                "scheduler": self.scheduler.state_dict(),
                "step": self.step,
                "random": states,
                "identity": self.identity(),
            }
            unfinished = self.path.with_suffix(".unfinished")
            with unfinished.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)

    def restore(self) -> None:
        """Goes on from the checkpoint, if there is one. Only rank 0 needs the file."""
        content: dict[str, Any] = {"model": {}, "optimizer": {}}
        if self.place.rank == 0 and self.path.exists():
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        small = [{k: v for k, v in content.items() if k not in ("model", "optimizer")}]
        dist.broadcast_object_list(small)
        found = small[0]
        if not found:
            return
        if not self.args.resume:
            raise SystemExit(
                f"{self.path} exists: --resume goes on from it, --out starts elsewhere"
            )
        ours = self.identity()
        changed = [k for k in ours if found["identity"].get(k) != ours[k]]
        if changed:
            was = ", ".join(f"{k}={found['identity'].get(k)} (now {ours[k]})" for k in changed)
            raise SystemExit(f"--resume: {self.path} is of another run: {was}")
        # Not set_state_dict, which leaves out the weights where none are given: on all other ranks.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(self.model, self.optimizer, content["optimizer"], options=options)
        set_model_state_dict(self.model, content["model"], options=options)
        self.scheduler.load_state_dict(found["scheduler"])
        self.step = found["step"]
        states = found["random"][self.place.rank]
        torch.set_rng_state(states[0])
        if self.place.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.place.device)


# ---------------------------------------------------------------------------------------- training


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """A line up, then half a cosine down; relative."""
    return min((step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def to_device(targets: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[Any]:
    return [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in targets]


def train_step(run: Run, images: list[Tensor], targets: list[Any]) -> dict[str, Tensor]:
    """One step; returns the losses of this process."""
    device = run.place.device
    with torch.autocast(device.type, torch.bfloat16, enabled=run.args.amp):
        losses: dict[str, Tensor] = run.model(
            [image.to(device, non_blocking=True) for image in images], to_device(targets, device)
        )
    run.optimizer.zero_grad()
    torch.stack([loss.float() for loss in losses.values()]).sum().backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), LARGEST_GRADIENT)
    run.optimizer.step()
    run.scheduler.step()
    run.step += 1
    return {name: loss.detach().float() for name, loss in losses.items()}


def evaluate(run: Run, dataset: CocoDetection, log: Log) -> None:
    place, args = run.place, run.args
    start = time.perf_counter()
    batches = coco_detection.shares(len(dataset), place.rank, place.world)
    loader = coco_detection.load(dataset, batches, args.workers)
    with torch.autocast(place.device.type, torch.bfloat16, enabled=args.amp):
        found = coco_detection.detect(run.core, loader, dataset.categories, place.device)
    everything = coco_detection.gather(found)
    if everything is None:
        return
    precision = coco_detection.average_precision(dataset.coco, everything)
    detections = sum(map(len, everything.values()))
    seconds = time.perf_counter() - start
    log("evaluation", step=run.step, detections=detections, seconds=seconds, **precision)
    if args.pictures:
        path = args.out / "pictures" / f"step_{run.step:06d}.png"
        coco_detection.draw(path, dataset, everything)


def source(args: Arguments, place: Place) -> Path:
    """The folder of the data set; the photographs are made where there are none."""
    if args.coco is None and place.local_rank == 0:
        (train, val), (height, width) = args.photo_counts, args.photo_size
        coco_photographs.write(args.photos, train, val, (height, width))
    dist.barrier()
    return Path(args.coco or args.photos)


def prepare(args: Arguments, place: Place, classes: int, steps: int) -> Run:
    """Model, optimiser and schedule; ``classes`` counts the background."""
    torch.manual_seed(args.seed)
    core = build_model(args, classes).to(place.device)
    model = distribute(core, args.fsdp, place.device)
    if args.compile:
        compile_parts(core)
    optimizer = torch.optim.AdamW(
        [p for p in core.parameters() if p.requires_grad], args.lr, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, args.warmup, steps)
    )
    # From here on each process draws its own numbers: which proposals are trained on.
    torch.manual_seed(coco_detection.mix(args.seed, place.rank))
    return Run(core, model, optimizer, scheduler, args, place)


def train(args: Arguments, place: Place) -> None:
    log = Log(args.out, place)
    log(
        "start",
        versions={m.__name__: m.__version__ for m in (glimpse_ext, torch, torchvision)},
        processes=place.world,
        threads=torch.get_num_threads(),
        arguments=vars(args),
    )
    folder = source(args, place)
    dataset = CocoDetection(folder, args.split, True, args.seed)
    held_out = CocoDetection(folder, args.val_split, False)
    order = Order(len(dataset), args.batch, place.rank, place.world, args.seed)
    steps = args.epochs * order.batches
    run = prepare(args, place, len(dataset.categories) + 1, steps)
    run.restore()

    bar = tqdm(total=steps, initial=run.step, desc="training", disable=place.rank > 0)
    window: list[Tensor] = []
    start = time.perf_counter()
    run.model.train()
    while run.step < steps:
        order.epoch, order.first = divmod(run.step, order.batches)
        for images, targets in coco_detection.load(dataset, order, args.workers):
            losses = train_step(run, images, targets)
            window.append(torch.stack(list(losses.values())))
            bar.update()
            if run.step % args.log_every == 0:
                mean = torch.stack(window).mean(0)
                dist.all_reduce(mean)
                values = (mean / place.world).tolist()
                seconds = (time.perf_counter() - start) / len(window)
                log(
                    "step",
                    step=run.step,
                    epoch=order.epoch,
                    lr=run.scheduler.get_last_lr()[0],
                    loss=sum(values),
                    **dict(zip(losses, values, strict=True)),
                    seconds_per_step=seconds,
                    images_per_second=args.batch * place.world / seconds,
                )
                bar.set_postfix(loss=f"{sum(values):.3f}", refresh=False)
                if not math.isfinite(sum(values)):
                    raise SystemExit(f"the loss is {sum(values)} at step {run.step}")
                window, start = [], time.perf_counter()
            if run.step == args.stop_after:
                log("stopped", step=run.step)
                return
            if run.step % args.save_every == 0 and run.step % order.batches:
                run.save()
        evaluate(run, held_out, log)
        run.save()
        start = time.perf_counter()
    bar.close()
    log("end", step=run.step, weights_sha256=weights_hash(run.model))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.use_deterministic_algorithms(True)
    place = join(args)
    try:
        with glimpse_ext.patch("torchvision"):
            train(args, place)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
