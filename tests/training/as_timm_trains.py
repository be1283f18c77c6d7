"""Makes the calls of timm's train.py, in its order, on a small network and images of noise.

Task, optimizer, resume, average of weights, compilation, DistributedDataParallel, saver, schedule;
then epochs of accumulated steps through timm's loss scaler. It prints nothing; the checkpoints in
--output say what came of it.
"""

import argparse
import contextlib
import os
from functools import partial

import timm
import torch
import torch.distributed as dist
from timm import utils
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)

from hf_specreg.training.timm_task import regularize_task

SMALL = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2}
BATCHES, BATCH = 5, 8  # an epoch: with two micro-batches a step, its last step has one


def parsed(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir")
    parser.add_argument("--output", required=True)
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--clip-grad", type=float)
    parser.add_argument("--amp-dtype", default="")
    parser.add_argument("--kd", default="")
    parser.add_argument("--resume", default="")
    parser.add_argument("--torchcompile", default="")
    parser.add_argument("--strength", type=float)
    return parser.parse_args(arguments)


def network():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, in_chans=1, **SMALL)


def batches(epoch, rank, processes):
    draws = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        images = torch.randn(BATCH, 1, 8, 8, generator=draws)
        labels = torch.randint(3, (BATCH,), generator=draws)
        part = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        yield images[part], labels[part]


def build_task(args, model):
    shared = {"criterion": LabelSmoothingCrossEntropy(0.1), "device": torch.device("cpu")}
    shared |= {"dtype": None, "verbose": False}
    if args.kd:
        kind = {"logit": LogitDistillationTask, "feature": FeatureDistillationTask}[args.kd]
        return kind(student_model=model, teacher_model=network(), **shared)
    return ClassificationTask(model=model, **shared)


def train_one_epoch(epoch, args, task, optimizer, scaler, autocast, scheduler, loader):
    trainable = task.get_trainable_module()
    trainable.train()
    accum_steps, left = args.grad_accum_steps, BATCHES % args.grad_accum_steps
    updates = epoch * -(-BATCHES // accum_steps)
    optimizer.zero_grad()
    for index, (images, labels) in enumerate(loader):
        need_update = index == BATCHES - 1 or (index + 1) % accum_steps == 0
        if index >= BATCHES - left:
            accum_steps = left
        waits = dist.is_initialized() and not need_update
        with task.no_sync() if waits else contextlib.nullcontext():
            with autocast():
                loss = task(images, labels)["loss"]
            if accum_steps > 1:
                loss /= accum_steps
            clip = {} if args.clip_grad is None else {"clip_grad": args.clip_grad}
            if clip:
                clip["parameters"] = task.get_clip_parameters(exclude_head=False)
            scaler(loss, optimizer, need_update=need_update, **clip)
        if need_update:
            updates += 1
            optimizer.zero_grad()
            task.update_ema(step=updates)
            scheduler.step_update(num_updates=updates)


def main(arguments):
    """Train, or go on from a checkpoint; return the task."""
    args = parsed(arguments)
    rank, processes = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if processes > 1:
        dist.init_process_group("gloo")
    task = build_task(args, network())
    if args.strength is not None:
        task = regularize_task(task, penalty={"strength": args.strength})
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt=args.opt, lr=args.lr)
    scaler, autocast = utils.NativeScaler(device="cpu"), contextlib.nullcontext
    if args.amp_dtype:
        autocast = partial(torch.autocast, "cpu", dtype=getattr(torch, args.amp_dtype))
    else:
        scaler._scaler = torch.amp.GradScaler("cpu", enabled=False)
    first = 0
    if args.resume:
        first = resume_task_checkpoint(task, args.resume, optimizer, scaler, log_info=False)
    task.setup_ema(decay=0.5)
    if args.resume:
        load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        task.compile_ema(backend=args.torchcompile)
    if processes > 1:
        task.prepare_distributed()
    saver = utils.CheckpointSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        amp_scaler=scaler,
        checkpoint_dir=args.output,
        recovery_dir=args.output,
        task=task,
    )
    updates = -(-BATCHES // args.grad_accum_steps)
    schedule = {"num_epochs": args.epochs, "warmup_epochs": 1, "warmup_lr": args.lr / 10}
    schedule |= {"step_on_epochs": False, "updates_per_epoch": updates}
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", **schedule)
    if first:
        scheduler.step_update(first * updates)
    for epoch in range(first, args.epochs):
        loader = batches(epoch, rank, processes)
        train_one_epoch(epoch, args, task, optimizer, scaler, autocast, scheduler, loader)
        if rank == 0:
            saver.save_checkpoint(epoch)
        scheduler.step(epoch + 1)
    if processes > 1:
        dist.destroy_process_group()
    return task


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
