"""What one iteration of Wan2.2-A14B would take on many GPUs: arithmetic on counted and measured unit costs.

Nothing here has run on a GPU. Every assumption is a field of `Assumed`, with its unit and where it comes from; every
function is a few lines that can be checked by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

GB, DAY = 1e9, 86400.0
DEGREES = (1, 2, 4, 8)  # of Ulysses, within one machine; all divide A14B's 40 heads and the tokens of both shapes
REFERENCE = 2  # forwards of the reference for one transition, guidance included
GRADIENT = 2  # forwards with gradient, likewise


def _assume(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Assumed:
    """A cluster of machines with eight H100 each. Values per GPU unless the unit says otherwise."""

    flops: float = _assume(989.4e12, "FLOP/s", "H100 SXM, bfloat16 without sparsity: NVIDIA's data sheet")
    tf32: float = _assume(494.7e12, "FLOP/s", "H100 SXM, TF32 without sparsity, for the VAE in fp32: the same")
    mfu: float = _assume(0.40, "share", "Llama 3 report: 0.38 to 0.43 on 8,192 to 16,384 H100; rushes' own is unknown")
    gpus: float = _assume(8, "GPUs a machine", "DGX H100")
    memory: float = _assume(80e9, "bytes", "H100 SXM")
    host: float = _assume(2e12, "bytes a machine", "DGX H100")
    pcie: float = _assume(25e9, "bytes/s", "our guess for pageable memory; PCIe 5 x16 carries 64e9 a direction")
    nvlink: float = _assume(360e9, "bytes/s", "80 % (our guess) of 450e9 a direction, NVIDIA's data sheet")
    network: float = _assume(40e9, "bytes/s", "80 % (our guess) of one 400 Gbit/s port a GPU, DGX H100")
    fs_read: float = _assume(40e9, "bytes/s, all machines", "our guess: a parallel file system of middling size")
    fs_write: float = _assume(20e9, "bytes/s, all machines", "our guess, likewise")
    fs_files: float = _assume(10_000, "files/s, all machines", "our guess for small files created and synced")
    machine_io: float = _assume(5e9, "bytes/s a machine", "our guess for one client of that file system")
    video: float = _assume(2.5e6, "bytes a video", "our guess for 81 frames of H.264 at crf 12")
    failures: float = _assume(1, "machines a day", "given; Llama 3 saw 419 in 54 days on 2,048 machines")
    detect: float = _assume(60, "s", "the longest that ranks wait for one that died")
    requeue: float = _assume(120, "s", "our guess: batch system, start of Python, process groups")


@dataclass(frozen=True)
class Units:
    """What one piece of work costs for one shape, in FLOP and bytes: counted by bench/scale_units.py."""

    forward: float
    """One forward of one sample."""
    trained: float
    """One transition in an update: guidance, reference, recomputation and backward included."""
    decode: float
    """Decoding one video."""
    tokens: int
    width: int
    layers: int
    weights: int
    """Bytes of one expert, bfloat16."""
    lora: int
    """Parameters of one expert's adapter."""
    text: int
    """Bytes of the text encoder, bfloat16."""
    vae: int
    """Bytes of the VAE, fp32."""
    state: int
    """Bytes of one stored state, 2 bytes a number."""
    working: int
    """Bytes alive in an update beside weights, gradients and moments, without sequence parallelism."""


@dataclass(frozen=True)
class Measured:
    """What bench/scale.py measures on its own machine and puts in here."""

    publish: float
    """Seconds to create, sync and link one small file."""
    write: float
    """Bytes a second of spooling samples and sealing the shard: checksums, sha256 and syncs included."""
    read: float
    """Bytes a second of reading states with their checksums, from the page cache."""


@dataclass(frozen=True)
class Iteration:
    """The work of one iteration; batches of one video."""

    prompts: int
    group: int = 16
    """Videos of one prompt."""
    groups_per_shard: int = 1
    steps: int = 10
    high: int = 2
    """Stochastic steps on the high-noise expert."""
    low: int = 1
    updates: int = 2
    """Of each expert."""
    replay: int = 8
    """Transitions of each expert and shard that the replay gate proves."""

    @property
    def videos(self) -> int:
        """All videos."""
        return self.prompts * self.group

    @property
    def shards(self) -> int:
        """Pieces of work that workers can claim."""
        return math.ceil(self.prompts / self.groups_per_shard)

    @property
    def samples(self) -> int:
        """Videos of a shard."""
        return self.groups_per_shard * self.group

    @property
    def states(self) -> int:
        """States stored of a sample, at most: before and after every stochastic step, and the last."""
        return 2 * (self.high + self.low) + 1


@dataclass(frozen=True)
class Scene:
    """One iteration on one cluster. Seconds, bytes, and GPU-seconds where a name says so."""

    gpus: int
    units: Units
    iteration: Iteration
    measured: Measured
    assumed: Assumed = Assumed()
    degrees: tuple[int, ...] = DEGREES
    """Ulysses degrees that the rollout may choose from."""

    @property
    def machines(self) -> int:
        """Machines, the last one perhaps not full."""
        return math.ceil(self.gpus / self.assumed.gpus)

    def compute(self, flop: float, degree: int = 1) -> float:
        """Seconds of `flop` on `degree` GPUs."""
        return flop / (degree * self.assumed.flops * self.assumed.mfu)

    def ulysses_bytes(self, degree: int) -> float:
        """Bytes that one GPU sends in one forward: in every block q, k, v and the output change owners, in bfloat16."""
        unit = self.units
        return 4 * unit.layers * (unit.tokens / degree) * unit.width * 2 * (degree - 1) / degree

    # --- Rollout -----------------------------------------------------------------------------------------------------

    @property
    def rollout_degree(self) -> int:
        """Smallest Ulysses degree at which every worker has a shard; the largest where none is enough."""
        return next((d for d in self.degrees if self.gpus // d <= self.iteration.shards), self.degrees[-1])

    @property
    def workers(self) -> int:
        """Groups of `rollout_degree` GPUs."""
        return self.gpus // self.rollout_degree

    @property
    def sample_bytes(self) -> float:
        """Bytes of one sample in a published shard; texts and records are small beside them."""
        return self.iteration.states * self.units.state + self.assumed.video

    @property
    def written_bytes(self) -> float:
        """Bytes written for one sample: x in fp32 and its states between the experts, the spool, the tar."""
        parked = 2 * self.units.state + 2 * self.iteration.high * self.units.state
        return parked + 2 * self.sample_bytes

    @property
    def files(self) -> float:
        """Files published for one sample: between the experts, in the spool, and its part of the shard's own."""
        return 2 + (self.iteration.groups_per_shard + 3) / self.iteration.samples  # texts; tar, index, manifest

    def sample_seconds(self) -> dict[str, float]:
        """Seconds of one sample on one worker, by what they go to. Nothing is hidden behind anything."""
        degree, forwards = self.rollout_degree, 2 * self.iteration.steps
        link = self.assumed.machine_io * degree / self.assumed.gpus
        return {
            "forwards of the rollout": self.compute(forwards * self.units.forward, degree),
            "Ulysses in the rollout": forwards * self.ulysses_bytes(degree) / self.assumed.nvlink,
            "decoding": self.units.decode / (self.assumed.tf32 * self.assumed.mfu),
            "writing shards": self.written_bytes / min(self.measured.write, link) + self.files * self.measured.publish,
            "swapping experts": 2 * self.units.weights / self.assumed.pcie / self.iteration.samples,
        }

    def rollout_seconds(self) -> float:
        """Seconds until the last worker is done. Shards are claimed whole, so the last round may be thin."""
        rounds = math.ceil(self.iteration.shards / self.workers)
        return rounds * self.iteration.samples * sum(self.sample_seconds().values())

    # --- Training ----------------------------------------------------------------------------------------------------

    @property
    def train_degree(self) -> int:
        """Smallest Ulysses degree at which an update fits, a tenth of the memory left alone.

        Weights, and adapter, gradients, two moments and average in fp32, are sharded over the machine; two blocks are
        whole, one in use and one on its way.
        """
        unit = self.units
        fixed = (unit.weights + 5 * 4 * unit.lora) / self.assumed.gpus + 2 * unit.weights / unit.layers
        return next((d for d in DEGREES if fixed + unit.working / d <= 0.9 * self.assumed.memory), DEGREES[-1])

    @property
    def ranks(self) -> int:
        """Groups of `train_degree` GPUs, which train different samples."""
        return self.gpus // self.train_degree

    def gather_bytes(self, shards: int) -> float:
        """Bytes that one GPU receives for a transition when weights are sharded over `shards` GPUs.

        All blocks are gathered for every forward with gradient, again for its backward, and for the reference.
        """
        return (2 * GRADIENT + REFERENCE) * self.units.weights * (shards - 1) / shards

    def pass_seconds(self) -> dict[str, float]:
        """Seconds of one transition in an update, by what they go to."""
        compute = self.compute(self.units.trained, self.train_degree)
        gather = self.gather_bytes(int(self.assumed.gpus)) / self.assumed.nvlink
        exchanges = 3 * GRADIENT + REFERENCE  # forward, recomputed, backward
        return {
            "updates": compute,
            "gathering weights": max(0.0, gather - compute),  # FSDP gathers a block while another is computed
            "Ulysses in training": exchanges * self.ulysses_bytes(self.train_degree) / self.assumed.nvlink,
            "summing gradients": self.sync_seconds(),
            "reading shards": 2 * self.units.state / self.measured.read,
        }

    def passes(self, steps: int) -> int:
        """Transitions that every rank computes in the updates of one expert, those of weight 0 included."""
        count, parts = self.iteration.videos * steps, self.iteration.updates
        edges = [count * part // parts for part in range(parts + 1)]
        return sum(math.ceil((edges[part + 1] - edges[part]) / self.ranks) for part in range(parts))

    @property
    def all_passes(self) -> int:
        """The same for both experts."""
        return self.passes(self.iteration.high) + self.passes(self.iteration.low)

    @property
    def padding(self) -> float:
        """Share of transitions of weight 0 among those computed in updates."""
        return 1 - self.iteration.videos * (self.iteration.high + self.iteration.low) / (self.all_passes * self.ranks)

    def replay_seconds(self) -> float:
        """Seconds of the replay gate: two forwards a transition."""
        count = 2 * self.iteration.shards * min(self.iteration.replay, self.iteration.samples)
        return math.ceil(count / self.ranks) * self.compute(2 * self.units.forward, self.train_degree)

    def sync_seconds(self) -> float:
        """Seconds of summing an adapter's fp32 gradients after a backward pass: in the machine, then over machines.

        HSDP: each GPU keeps the sum of its eighth, and exchanges that with its like in the other machines.
        """
        a, machines = self.assumed, self.machines
        size = 4 * self.units.lora
        across = 2 * (machines - 1) / machines * size / a.gpus / a.network
        return size * (a.gpus - 1) / a.gpus / a.nvlink + across

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of one trainer checkpoint: adapter, two moments and average of one expert, in fp32."""
        return 4 * 4 * self.units.lora

    def checkpoint_seconds(self) -> float:
        """Seconds that training stands still for a checkpoint that all machines write together."""
        speed = min(self.assumed.fs_write, self.machines * self.assumed.machine_io)
        return self.checkpoint_bytes / speed + 3 * self.measured.publish

    def update_seconds(self) -> float:
        """Mean seconds of one update."""
        updates = 2 * self.iteration.updates
        return self.all_passes * sum(self.pass_seconds().values()) / updates + self.checkpoint_seconds()

    def train_seconds(self) -> float:
        """Seconds of the training stage: the gate, then the updates of both experts."""
        return self.replay_seconds() + 2 * self.iteration.updates * self.update_seconds()

    # --- The whole ---------------------------------------------------------------------------------------------------

    def breakdown(self) -> dict[str, float]:
        """Seconds of the iteration by what they go to, in the mean over all GPUs; they add up to the whole."""
        share = self.iteration.videos * self.rollout_degree / self.gpus
        parts = {name: share * seconds for name, seconds in self.sample_seconds().items()}
        parts["no shard left"] = self.rollout_seconds() - sum(parts.values())
        one = self.pass_seconds()
        share = self.iteration.videos * (self.iteration.high + self.iteration.low) * self.train_degree / self.gpus
        parts |= {name: share * seconds for name, seconds in one.items()}
        parts["padding"] = (self.all_passes - share) * sum(one.values())
        parts["replay gate"] = self.replay_seconds()
        parts["checkpoints"] = 2 * self.iteration.updates * self.checkpoint_seconds()
        return parts

    def seconds(self) -> float:
        """Seconds of rollout and training."""
        return self.rollout_seconds() + self.train_seconds()

    def efficiency(self) -> float:
        """Share of GPU time in forwards of the rollout, decoding and updates. Under Ulysses one GPU decodes for all."""
        parts = self.breakdown()
        useful = parts["forwards of the rollout"] + parts["decoding"] / self.rollout_degree + parts["updates"]
        return useful / self.seconds()
