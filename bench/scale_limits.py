"""What a simulated iteration runs into first, and what the death of a machine costs it."""

from __future__ import annotations

import math
from dataclasses import replace

from bench.scale_simulation import DAY, Scene
from shards.workers.claims import BEATS
from shards.workers.owners import SECONDS

SHARED = "file system"  # loads whose names begin so are carried by all GPUs together and grow with them


def loads(scene: Scene) -> dict[str, float]:
    """How much of each resource is taken while the GPUs work: 1 is all there is."""
    a, unit, one = scene.assumed, scene.units, scene.pass_seconds()
    sample = scene.sample_seconds()
    seconds = sum(sample.values())
    workers = min(scene.workers, scene.iteration.shards)
    written = scene.written_bytes / seconds
    gathered = scene.gather_bytes(int(a.gpus)) / a.nvlink
    return {
        "file system, bytes written": workers * written / a.fs_write,
        "file system, files created": workers * (scene.files / seconds + BEATS / SECONDS) / a.fs_files,
        "file system, bytes read": scene.ranks * 2 * unit.state / sum(one.values()) / a.fs_read,
        "a machine's link to the file system": a.gpus / scene.rollout_degree * written / a.machine_io,
        "PCIe (experts swapped)": sample["swapping experts"] / seconds,
        "NVLink (Ulysses in the rollout)": sample["Ulysses in the rollout"] / seconds,
        "NVLink (weights gathered in training)": gathered / one["updates"],
        "host memory": host_bytes(scene) / a.host,
    }


def host_bytes(scene: Scene) -> float:
    """Bytes in a machine while its GPUs roll out, a process each: experts, text encoder, VAE, a shard in the making."""
    unit, one = scene.units, scene.iteration
    waiting = one.samples * (one.states + 2) * unit.state  # x is fp32
    return scene.assumed.gpus * (2 * (unit.weights + 4 * unit.lora) + unit.text + unit.vae + waiting)


def first(scene: Scene) -> tuple[str, float]:
    """The resource of which the largest part is taken, and that part."""
    return max(loads(scene).items(), key=lambda item: item[1])


def full_at(scene: Scene) -> tuple[str, int]:
    """The shared resource that would be full first if GPUs and shards were added in step, and the GPUs at that point.

    Counted at one GPU a worker, which asks most of it.
    """
    wide = replace(scene, iteration=replace(scene.iteration, prompts=max(scene.iteration.prompts, scene.gpus)))
    shared = {name: part for name, part in loads(wide).items() if name.startswith(SHARED)}
    name = max(shared, key=lambda one: shared[one])
    return name, int(scene.gpus / shared[name])


def flat_gather(scene: Scene) -> float:
    """Seconds of gathering weights over the network for one second of computing, if they were sharded over all GPUs."""
    return scene.gather_bytes(scene.gpus) / scene.assumed.network / scene.pass_seconds()["updates"]


def load_seconds(scene: Scene, machines: int) -> float:
    """Seconds of loading the model when so many machines begin at once: read once a machine, then over PCIe."""
    a, unit = scene.assumed, scene.units
    size = 2 * unit.weights + unit.text + unit.vae
    return size / min(a.machine_io, a.fs_read / machines) + size / a.pcie


# --- Failures --------------------------------------------------------------------------------------------------------


def young(cost: float, between: float) -> float:
    """Best seconds between checkpoints that take `cost` s, with `between` s from failure to failure.

    Young 1974, "A first order approximation to the optimum checkpoint interval": sqrt(2 cost between).
    """
    return math.sqrt(2 * cost * between)


def daly(cost: float, between: float) -> float:
    """The same to a higher order: Daly 2006, "A higher order estimate of the optimum checkpoint interval", equation 37.

    For checkpoints that take twice the time between failures, or more, that time itself.
    """
    if cost >= 2 * between:
        return between
    x = math.sqrt(cost / (2 * between))
    return math.sqrt(2 * cost * between) * (1 + x / 3 + x * x / 9) - cost


def lost_share(interval: float, cost: float, restart: float, between: float) -> float:
    """Share of time that checkpoints and failures take: a failure costs half an interval and a restart."""
    return cost / interval + (interval / 2 + restart) / between


def between_failures(scene: Scene) -> float:
    """Mean seconds between failures of the whole cluster."""
    return DAY / scene.assumed.failures


def rollout_loss(scene: Scene) -> float:
    """GPU-seconds lost when a machine dies in a rollout: half a sample, its restart, its loading. Others continue."""
    half = sum(scene.sample_seconds().values()) / 2
    return min(scene.gpus, scene.assumed.gpus) * (half + scene.assumed.requeue + load_seconds(scene, 1))


def train_restart(scene: Scene) -> float:
    """Seconds from a death in training to the next update: noticed, queued again, loaded. All GPUs stand still."""
    return scene.assumed.detect + scene.assumed.requeue + load_seconds(scene, scene.machines)


def train_loss(scene: Scene) -> float:
    """GPU-seconds lost when a machine dies in training, with a checkpoint after every update."""
    return scene.gpus * (scene.update_seconds() / 2 + train_restart(scene))


def full_checkpoint_seconds(scene: Scene) -> float:
    """Seconds of a checkpoint when all weights are trained: fp32 masters, two moments and average of one expert."""
    size = 4 * 4 * (scene.units.weights / 2)
    return size / min(scene.assumed.fs_write, scene.machines * scene.assumed.machine_io)
