"""The training loop: fetch, ask the teacher, step, log, evaluate, save. One function, read top to bottom.

Everything random is a function of (seed, step, sample), so the loop keeps no state but the network, the optimizer
and the number of the step: a run that was killed goes on from its last checkpoint to the same weights.

Names: R rows and V views of this process's share of the batch, K classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
from student_trainer import checkpoint, run_folder, weights_and_biases
from student_trainer.audit import ViewAudit, teacher_rendering
from student_trainer.config import FREE_ON_RESUME, Config, flag, settings
from student_trainer.course import course_of
from student_trainer.evaluate import Evaluation
from student_trainer.exporter import Exporter
from student_trainer.fixed_teacher import FixedTeacher, fill_together
from student_trainer.fleet import Fleet, TeacherError
from student_trainer.live import follow
from student_trainer.loader import Source, run_ahead
from student_trainer.logit_store import StoreGoneError
from student_trainer.loss import agreement, distillation_loss, entropy, kl_divergence, mixup_cross_entropy, one_teacher
from student_trainer.metrics import Metrics, read
from student_trainer.optimizer import clip_gradients, make_optimizer, set_schedule
from student_trainer.stop_signal import StopSignal
from student_trainer.student import make_student
from student_trainer.teachers import LiveTeacher, Teacher, fleets, services
from student_trainer.weights_and_biases import WeightsAndBiases
from student_trainer.world import World
from views.mix import mix
from views.philox import philox_once
from views.render import Renderer, Rendering

log = logging.getLogger(__name__)

_DROPOUT = 16  # purpose of the random numbers inside the network; those of the views are below (views/draw.py)


class NonFiniteLossError(RuntimeError):
    """The loss is not a number; training on would spoil the weights."""


def train(config: Config, world: World) -> dict[str, Any]:
    """Run a recipe to its end, from its last checkpoint if there is one. Returns the summary (summary.json).

    Raises:
        NonFiniteLossError: on all ranks, before the update.
        TeacherError: nobody answers, or the teachers refuse; on all ranks, with a checkpoint of where they were.
        StoreGoneError: the store of a fixed teacher is gone; likewise.
        ValueError: settings that do not fit each other or the checkpoint.
    """
    with contextlib.ExitStack() as cleanup:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        stop_signal = StopSignal()
        device_id = world.device.index if world.device.type == "cuda" else None

        # ---- what we train on ------------------------------------------------------------------------------
        models.check_name(config.student.architecture)  # a typing error must not wait for the teacher to load
        if config.wandb:
            world.raise_together(weights_and_biases.what_is_missing() if world.is_main else None)
        course = course_of(config, world)
        index, eval_index, samples = course.index, course.eval_index, course.plan.samples
        schedule, total_steps = course.schedule, course.schedule.num_steps
        rendering = Rendering(
            size=config.student.size, interpolation=config.student.interpolation, antialias=config.student.antialias
        )

        # ---- where we were ---------------------------------------------------------------------------------
        saved = world.broadcast_object(checkpoint.load_latest(config.run_dir) if world.is_main else None)
        first_step = 0
        if saved is not None:
            checkpoint.refuse_other_settings(saved["config"], settings(config), FREE_ON_RESUME)
            first_step = saved["step"]
        summary_file = config.run_dir / "summary.json"
        if first_step == total_steps and summary_file.exists():
            world.say(f"{config.run_dir} is finished: its numbers again. To train anew, choose another --run-dir")
            return dict(json.loads(summary_file.read_text()))

        # ---- who teaches -----------------------------------------------------------------------------------
        met: tuple[Fleet, ...] = ()
        eval_met: tuple[Fleet, ...] = ()
        audits: list[ViewAudit] = []
        if config.targets == "teacher":
            addresses = cleanup.enter_context(services(config, world))
            client = _name_among_others(config, world)
            met = eval_met = cleanup.enter_context(fleets(config, addresses, index.digest, client))
            if eval_index is not index:  # pictures of another data set travel in another way, perhaps
                eval_met = cleanup.enter_context(fleets(config, addresses, eval_index.digest, client))
            stop_signal.hurried = {*met, *eval_met}
            audits = [ViewAudit(index, fleet, rendering, device_id) for fleet in met]
            num_classes = met[0].description.num_classes
            if eval_index.classes and num_classes != len(eval_index.classes):
                raise ValueError(
                    f"the teacher has {num_classes} classes, {eval_index.root} {len(eval_index.classes)}: is it a "
                    "teacher for this data set? To learn from pictures of another one, give the teacher's own by "
                    "--data.evaluate-root"
                )
        else:
            num_classes = len(index.classes)

        def live(fleet: Fleet, num_views: int, num_audits: Callable[[int], int] | None = None) -> LiveTeacher:
            theirs = teacher_rendering(fleet.description, rendering)
            renders = fleet.transport == "pixels"
            renderer = Renderer(theirs, num_views, device_id, config.decode_threads) if renders else None
            return LiveTeacher(fleet, renderer, num_audits)

        asked = [live(fleet, course.num_rows + 1, _audit_plan(config)) for fleet in met]
        teachers: list[Teacher] = list(asked)
        if config.views.kind == "fix":
            fixed = [
                FixedTeacher(one, index, config.views.fixed, config.teacher.store, config.teacher.store_failure)
                for one in asked
            ]
            for one, audit in zip(fixed, audits, strict=True):
                cleanup.callback(one.store.close)
                if not fill_together(one, audit, samples, world, stop_signal):
                    world.say("stopped by a signal while the store was filled; the same command goes on from here")
                    return {"steps": first_step, "stopped": True}
            teachers = list(fixed)

        # ---- who learns ------------------------------------------------------------------------------------
        torch.manual_seed(config.seed)
        student, card = make_student(config, num_classes, eval_index.name)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        student.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = make_optimizer(student, config.optim)
        scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        autocast_dtype = getattr(torch, config.precision)

        # ---- go on from where we were ----------------------------------------------------------------------
        who = [fleet.description for fleet in met]
        identity = {"data": index.digest, "teacher": " ".join(one.fingerprint for one in who)}
        if saved is not None:
            checkpoint.refuse_other_settings(saved["identity"], identity)
            student.load_state_dict(saved["student"])
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
        network = DistributedDataParallel(student) if world.connected else student

        # ---- say what will be done -------------------------------------------------------------------------
        _introduce(config, world, student, met, total_steps, first_step)
        metrics = None
        if world.is_main:
            run_folder.write_facts(config, student, who, len(samples), total_steps)
            # Without a checkpoint this is 0: what a run wrote before its first one is written again.
            board = cleanup.enter_context(WeightsAndBiases(config)) if config.wandb else None
            metrics = cleanup.enter_context(Metrics(config.run_dir, first_step, board.write if board else None))
        exporter = None
        if config.metrics_address:
            exporter = cleanup.enter_context(Exporter(config.metrics_address, world.local_rank, met))
        renderer = Renderer(rendering, course.num_rows + 1, device_id, config.decode_threads)
        source = Source(index, renderer, teachers)
        evaluation = Evaluation(
            config, world, eval_index, Renderer(rendering, config.eval_batch, device_id, config.decode_threads),
            [live(fleet, config.eval_batch) for fleet in eval_met], card,
        )  # fmt: skip

        def save(step: int, must: bool = False) -> None:
            """A checkpoint that finds no room is missed, and no reason to stop; the last one `must` be."""
            if not world.is_main:
                return
            try:
                checkpoint.save(config.run_dir, {
                    "step": step, "student": student.state_dict(), "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(), "config": settings(config), "identity": identity,
                })  # fmt: skip
            except checkpoint.FullDiskError as error:
                if must:
                    raise
                log.error("%s. Training goes on without it", error)

        def evaluation_is_due(step: int) -> bool:
            return step == total_steps or bool(config.evaluate_every and step % config.evaluate_every == 0)

        batches = run_ahead(source, map(course.lesson, range(first_step, total_steps)), config.prefetch)
        cleanup.callback(batches.close)
        progress = cleanup.enter_context(follow(config, world, first_step, total_steps, met))
        labels = torch.from_numpy(np.array(index.label)) if config.targets == "labels" else None
        buffers = list(student.buffers())  # batch statistics: a forward pass changes them, updated or not
        kept_buffers = [buffer.clone() for buffer in buffers]
        network.train()

        # ---- make up for an evaluation that the teachers were gone for ---------------------------------------
        if first_step and evaluation_is_due(first_step):
            lacks = not any(line["step"] == first_step and "eval/examples" in line for line in read(config.run_dir))
            if world.broadcast_object(lacks):
                line = evaluation.run(student)
                metrics.write(first_step, line) if metrics else None
        last_time = time.monotonic()

        for step in range(first_step, total_steps):
            # ---- fetch -------------------------------------------------------------------------------------
            batch = next(batches)
            fetched_time = time.monotonic()
            if step == first_step and world.is_main:
                shown = batch.lesson.asked
                if config.views.kind == "fix" and audits:  # of many averaged views, the first
                    first_view = dataclasses.replace(config.views.fixed, num_views=1)
                    shown = first_view.rows(batch.rows.sample[: len(batch.rows)], index.height, index.width)
                run_folder.draw_first_batch(config, batch, shown, audits)
            partner = torch.from_numpy(batch.rows.partner).long().to(world.device)
            lam = torch.from_numpy(batch.rows.lam).to(world.device)
            images_R3SS = mix(batch.pixels.to(world.device), partner, lam, card.mean, card.std)
            images_R3SS = images_R3SS.contiguous(memory_format=memory_format)

            # ---- ask the teacher (asked long ago: this waits for what is missing) ---------------------------
            asked_time = time.monotonic()
            teacher_MRK, gone = None, None
            if batch.targets:
                try:
                    answers = [torch.from_numpy(target.result()) for target in batch.targets]
                except (TeacherError, StoreGoneError) as error:
                    # The others are in this step's collectives, or will be: go there too, with zeros, and say it there.
                    gone = error
                    answers = [torch.zeros(len(batch.rows), num_classes)] * len(batch.targets)
                teacher_MRK = torch.stack(answers).to(world.device)
            teacher_wait_s = time.monotonic() - asked_time

            # ---- step --------------------------------------------------------------------------------------
            torch.manual_seed(philox_once(config.seed, step & 0xFFFFFFFF, world.rank, 0, _DROPOUT << 16)[0])
            lr = set_schedule(optimizer, schedule(step))
            if buffers:
                torch._foreach_copy_(kept_buffers, buffers)
            with torch.autocast(world.device.type, autocast_dtype, enabled=config.precision != "float32"):
                student_RK = network(images_R3SS).float()
            if teacher_MRK is not None:
                loss = distillation_loss(student_RK, teacher_MRK, config.optim.temperature, config.teacher.ensemble)
            else:
                assert labels is not None
                labels_V = labels[batch.rows.sample].long().to(world.device)
                loss = mixup_cross_entropy(student_RK, labels_V, partner, lam)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(student.parameters(), config.optim.clip_norm)
            with torch.no_grad():  # to look at costs no graph
                numbers = {"loss": loss, "student_entropy": entropy(student_RK).mean()}
                if teacher_MRK is not None:
                    teacher_RK = one_teacher(teacher_MRK, config.teacher.ensemble)
                    numbers |= {
                        "kl": kl_divergence(student_RK, teacher_RK).mean(),
                        "teacher_entropy": entropy(teacher_RK).mean(),
                        "agreement_top1": agreement(student_RK, teacher_RK, k=1).float().mean(),
                    }
            if config.views.kind == "fix":
                recomputed = sum(target.recomputed for target in batch.targets)
                numbers["recomputed_share"] = torch.tensor(recomputed / max(1, len(batch.rows)), device=world.device)
            numbers["stop"] = torch.tensor(float(stop_signal.received), device=world.device)
            numbers["gone"] = torch.tensor(float(gone is not None), device=world.device)
            values = world.all_mean(torch.stack([value.detach().float() for value in numbers.values()])).tolist()
            line = dict(zip(numbers, values, strict=True))
            must_stop = line.pop("stop") > 0
            if line.pop("gone") > 0:  # some rank learned nothing: as if this step had not been, on all ranks
                if buffers:
                    torch._foreach_copy_(buffers, kept_buffers)
                save(step, must=must_stop)
                if must_stop:
                    return _stopped(world, step)
                world.raise_together(gone)
            line["grad_norm"] = float(grad_norm)
            # A scaler skips infinite gradients by itself and lowers its scale; the loss must be finite always.
            watched = ("loss",) if scaler.is_enabled() else ("loss", "grad_norm")
            for name in watched:
                if not math.isfinite(line[name]):
                    raise NonFiniteLossError(
                        f"the {name} is {line[name]} at step {step}, on all ranks, before the update. The last "
                        "checkpoint is from before it. A lower --optim.lr or more --optim.warmup-steps often help."
                    )
            scaler.step(optimizer)
            scaler.update()

            # ---- log ---------------------------------------------------------------------------------------
            done = step + 1
            now = time.monotonic()
            line |= {
                "lr": lr, "images_per_s": config.optim.batch_size / (now - last_time),
                "data_wait_s": fetched_time - last_time, "teacher_wait_s": teacher_wait_s,
            }  # fmt: skip
            seen = [
                audit.mismatch(batch.lesson, vouched, batch.pixels)
                for audit, target in zip(audits, batch.targets, strict=True)
                if (vouched := target.audit())
            ]
            if seen:
                line["view_mismatch"] = world.all_max(torch.tensor(max(seen), device=world.device)).item()
            last_time = now
            progress.step(done, line)

            # ---- evaluate ----------------------------------------------------------------------------------
            evaluate = evaluation_is_due(done)
            if evaluate:
                progress.doing("evaluating")
                try:
                    line |= evaluation.run(student)
                except TeacherError:
                    metrics.write(done, line) if metrics else None
                    save(done)
                    raise
                progress.evaluated(done, line)
                progress.say(_evaluation_line(done, line))
                last_time = time.monotonic()
            if metrics and (evaluate or "view_mismatch" in line or step % config.log_every == 0):
                metrics.write(done, line)
            if exporter:
                exporter.step(done, line)

            # ---- save --------------------------------------------------------------------------------------
            if done == total_steps or done % config.checkpoint_every == 0 or must_stop:
                save(done, must=done == total_steps or must_stop)
                last_time = time.monotonic()
            if must_stop:
                return _stopped(world, done)

        return run_folder.finish(config, world, student, card, total_steps)


def _stopped(world: World, step: int) -> dict[str, Any]:
    world.say(f"stopped at step {step} by a signal; the same command goes on from here")
    return {"steps": step, "stopped": True}


def _name_among_others(config: Config, world: World) -> str:
    """What this run is called at its teachers, 64 bytes at most: the same on all ranks, another one each start."""
    name = f"{config.recipe[:28]}:{config.run_dir.name[:24]}".encode()[:55].decode(errors="ignore")
    return world.broadcast_object(f"{name}:{secrets.token_hex(4)}")


def _audit_plan(config: Config) -> Any:
    """How many views of a step the teacher shall vouch for."""
    every, views = config.teacher.audit_every, config.teacher.audit_views
    return lambda step: views if every and step % every == 0 else 0


def _introduce(
    config: Config, world: World, student: nn.Module, met: Sequence[Fleet], total_steps: int, first_step: int
) -> None:
    """Before the first step: the resolved config, the parameter table, one line per process."""
    world.say(f"recipe {config.recipe}:\n" + "\n".join(f"  {flag(k)} {v}" for k, v in settings(config).items()))
    table = [(name, sum(p.numel() for p in child.parameters())) for name, child in student.named_children()]
    rows = [f"  {name:24}{count:>14,}" for name, count in [*table, ("total", sum(count for _, count in table))]]
    world.say(f"student {config.student.architecture}, parameters:\n" + "\n".join(rows))
    teacher = "no teacher (labels)"
    if met:
        teacher = " and ".join(
            f"teacher {fleet.description.model} {fleet.description.precision} {fleet.description.rendering.size} px, "
            f"pictures by {fleet.transport}" for fleet in met
        )  # fmt: skip
    print(f"rank {world.rank} of {world.size}: {world.device}, torch {torch.__version__}, {teacher}", flush=True)
    world.barrier()
    begin = f"going on from step {first_step}" if first_step else "from the beginning"
    world.say(f"{total_steps} steps of {config.optim.batch_size} rows, {begin}; everything goes to {config.run_dir}")


def _evaluation_line(step: int, line: dict[str, Any]) -> str:
    shown = [f"{name.removeprefix('eval/')} {value:.4f}" for name, value in line.items() if name.startswith("eval/")]
    return f"step {step}: " + ", ".join(shown)
