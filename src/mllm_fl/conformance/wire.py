"""What travels and what may be looked at: bytes as declared, precision, numbers of classes, and no test image anywhere."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm
from mllm_fl.algorithms.refusal import why_answer_refused, why_refused
from mllm_fl.conformance.checks import distance, sound
from mllm_fl.conformance.play import LOCAL, play
from mllm_fl.conformance.row import Row
from mllm_fl.engines.local import train_client
from mllm_fl.trees import nbytes


def bytes_as_declared(row: Row) -> str | None:
    """``upload_bytes`` and ``download_bytes`` are what is counted, at the neutral value too; the words are "nothing" exactly where nothing is."""
    up, down = 0, 0
    for method in (row.plain, row.rich):
        found = _counted(row, method)
        if isinstance(found, str):
            return found
        up, down = found
    for words, name, counted in ((row.method.uploads, "uploads", up), (row.method.downloads, "downloads", down)):
        if (words == "nothing") != (counted == 0):
            return f"{name} says {words!r}, and {counted} bytes are counted; say in words what they are"
    return None


def _counted(row: Row, method: Algorithm) -> str | tuple[int, int]:
    """The most bytes that a client sends and receives beyond weights, or a sentence where they are not those declared."""
    world = row.world(classes=4, sizes=(14, 9, 3))
    task, played, up = world.task, play(method, world, rounds=3), [0]
    for u in played.updates[-1]:
        present = len(set(world.clients[u.client].labels.tolist()))
        counted = nbytes(u.extra) + nbytes(played.answers.get(u.client, {}))
        if counted != (said := method.upload_bytes(task, present)):
            what = "sends" if not played.answers else "sends and answers"
            return f"a client with {present} classes {what} {counted} bytes beyond weights, upload_bytes says {said}"
        up.append(counted)
    down = nbytes(played.sent[-1].extra)
    if down != (said := method.download_bytes(task)):
        return f"a client receives {down} bytes beyond weights, download_bytes says {said}"
    return max(up), down


def form_as_declared(row: Row) -> str | None:
    """What clients send beside weights, and answer to a survey, is declared in its form, so that another form can be refused."""
    world = row.world(classes=4, sizes=(14, 9, 3))
    task = world.task
    for method in (row.plain, row.rich):
        msg = method.broadcast(method.init(task, world.w))
        for k in range(len(world.clients)):
            shard = world.shard(k, 1, method.needs)
            u, answer = train_client(task, method, msg, {}, shard, LOCAL)[0], method.survey(task, msg, shard)
            if u.extra and method.upload_form(task) is None:
                return f"clients send {min(u.extra)!r} beside weights and upload_form does not say so: no wrong shape could be refused"
            if said := why_refused(method, task, u, msg.w):
                return f"an update as finish makes it is refused ({said}): upload_form says another form, or the weights are another's"
            if answer and method.survey_form(task) is None:
                return (
                    f"clients answer {min(answer)!r} and survey_form does not say so: no wrong shape could be refused"
                )
            if said := why_answer_refused(method, task, answer):
                return f"an answer as survey makes it is refused ({said}): survey_form says another form"
    return None


def precisions(row: Row) -> str | None:
    """In bfloat16 as in float32: weights and state stay float32, and the result is near."""
    world = row.world()
    half = replace(world, task=replace(world.task, precision="bf16"))
    a, b = play(row.rich, world), play(row.rich, half)
    for where, tree in (("weights", b.state.w), ("server state", b.state.extra), ("deployed weights", b.deployed)):
        for k, v in tree.items():
            if v.dtype in (torch.bfloat16, torch.float16):
                return (
                    f"with task.precision = 'bf16', {k} of the {where} becomes {v.dtype}; only passes run in bfloat16"
                )
    if said := sound(row, b, "with task.precision = 'bf16'"):
        return said
    if (apart := distance(b.state.w, a.state.w, world.w)) > 0.5:
        return f"bfloat16 and float32 end far apart ({apart:.0%} of the move): a sum or a loss runs in bfloat16"
    return None


def two_classes(row: Row) -> str | None:
    """A task of two classes."""
    return sound(row, play(row.rich, row.world(classes=2)), "with two classes")


def a_thousand_classes(row: Row) -> str | None:
    """A task of a thousand classes, of which each client holds a few."""
    played = play(row.rich, row.world(classes=1000, sizes=(6, 3)), rounds=1)
    return sound(row, played, "with a thousand classes, most without an image")


def no_test_image(row: Row) -> str | None:
    """The server's images are not test images, by hash, and no test image passes through the network before the end."""
    world = row.world()
    secret = set(world.test.hashes())
    for name, images in (("unlabelled", world.task.unlabelled), ("labelled", world.task.labelled)):
        if images is not None and (n := sum(h in secret for h in images.hashes())):
            return (
                f"{n} of the {len(images)} {name} server images are test images: take them from another set, or from"
                " training images that no client holds"
            )
    known = {_hash(x) for x in world.test.normalised(range(len(world.test)))}
    seen: list[int] = []

    def look(module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(x, Tensor) and x.dim() == 4 and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            seen.append(sum(_hash(row) in known for row in x.detach().float()))

    hook = world.task.net.register_forward_pre_hook(look)
    try:
        play(row.rich, world, local=replace(LOCAL, augment="none"))
    finally:
        hook.remove()
    if sum(seen):
        return (
            f"test images pass through the network {sum(seen)} times in two rounds; a method sees its clients' images and"
            " task.unlabelled or task.labelled, nothing else"
        )
    return None


def _hash(x: Tensor) -> bytes:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).digest()
