"""`rushes plan-memory`: what each stage of a run will need on the device and on the host, on one rank or on many."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rollout.memory.estimate import (
    Model,
    batch_of,
    block_input_bytes,
    full_state,
    lora_state,
    read_model,
    state_bytes,
    weight_bytes,
)
from rollout.policy.folder import tokens
from rollout.policy.sharding import check_ulysses
from rollout.policy.sizes import decode_peak, meta_expert, working
from rollout.ranks.world import World, check_degrees
from shards.errors import UserError
from shards.run import Run

GIB = 2**30
ALONE = World()
FILE = 2**31  # torch holds as much of a checkpoint once more while it writes a file


@dataclass(frozen=True)
class Need:
    """What one stage needs, in bytes: `device` at its peak, `host` beside the memory of the program itself."""

    stage: str
    device: int
    host: int
    parts: dict[str, int]
    """What the device holds at the peak, by name."""
    reserved: int
    """What PyTorch's allocator takes from the device for it: what is alive, and the gaps between."""


def plan_memory(run: Run, ranks: int = 0) -> list[Need]:
    """The needs of text encoder, rollout, decoding and training, for the model and the shape of run.toml.

    They are those of one rank, the first, of `ranks` that train together; 0 stands for as few as `train.ulysses` and
    `train.replicate` allow. Raises UserError for a folder that holds no Wan model, for a shape it cannot make, and for
    ranks that cannot be divided as run.toml says.
    """
    model, world = read_model(run.config), _world(run, ranks)
    _check_tokens(model, world, "train.ulysses")
    degree = run.config.rollout.ulysses
    _check_tokens(model, World(0, degree, degree), "rollout.ulysses")
    needs = [_encode(model), _rollout(model), _decode(model)]
    return needs + [_train(model, full, saving, world) for full in (False, True) for saving in (True, False)]


def train_need(run: Run, ranks: int = 0) -> Need:
    """What training as run.toml has it needs on the first of `ranks`; 0: in one process. Raises as `plan_memory`."""
    train, world = run.config.train, _world(run, ranks) if ranks else ALONE
    return _train(read_model(run.config), train.full, train.gradient_checkpointing, world)


def render(run: Run, needs: list[Need], ranks: int = 0) -> str:
    """The table for the command line, in GiB, or in MiB below one; the setting that run.toml has is marked."""
    train, world = run.config.train, _world(run, ranks)
    chosen = _train_name(train.full, train.gradient_checkpointing)
    largest = max((value for need in needs for value in (need.device, need.host, need.reserved)), default=0)
    unit, name = (GIB, "GiB") if largest >= GIB else (GIB / 1024, "MiB")
    lines = [f"  {'stage':<36}{f'device {name}':>11}{f'host {name}':>10}{'reserved':>10}  on the device"]
    for need in needs:
        parts = ", ".join(f"{part} {value / unit:.2f}" for part, value in need.parts.items() if value)
        mark = "*" if need.stage == chosen else " "
        numbers = f"{need.device / unit:>11.2f}{need.host / unit:>10.2f}{need.reserved / unit:>10.2f}"
        lines.append(f"{mark} {need.stage:<36}{numbers}  {parts}")
    video = run.config.rollout
    shape = f"{video.height}x{video.width}, {video.frames} frames, batch {batch_of(run.config)}"
    lines.append(f"* as run.toml has it; {shape}, {run.config.model.dtype}")
    if world.size == 1:
        lines.append("For one process. --ranks N divides training among N, as torchrun would start them.")
    else:
        lines.append(f"For the first of {world.size} ranks; a machine holds all of its own. Training has")
        lines.append(f"{_shards(world)} shards of the weights, and the ranks on one video are {world.ulysses}.")
    if (degree := run.config.rollout.ulysses) > 1:
        lines.append(f"Rollout is that of one of the {degree} ranks that make a video together.")
    lines.append("Counted on the meta device, one expert on the device; reserved is what PyTorch's allocator takes for")
    lines.append("that, simulated. Not in it: CUDA itself (about 0.5 to 1 GiB), scratch space inside kernels, what")
    lines.append("ranks send each other.")
    return "\n".join(lines)


def _world(run: Run, ranks: int) -> World:
    """The ranks of training, which need not exist. UserError when they cannot be divided so."""
    train = run.config.train
    size = ranks or train.ulysses * train.replicate
    if size < 1:
        raise UserError(f"--ranks {ranks}: no number of ranks", "for example --ranks 8")
    check_degrees(size, train.ulysses, train.replicate)
    return World(0, size, train.ulysses, train.replicate)


def _check_tokens(model: Model, world: World, setting: str) -> None:
    """UserError when the ranks cannot share the tokens of a video."""
    if world.ulysses > 1:
        check_ulysses(meta_expert(model.transformer, 1), model.shape, world, setting)


def _shards(world: World) -> int:
    """Ranks that hold the weights of one copy of the model together."""
    return world.size // world.replicate


# --- Before training: every rank for itself, with the whole model -----------------------------------------------------


def _encode(model: Model) -> Need:
    return _need(
        "encode prompts", {"text encoder": model.text}, len(model.layout.expert_ids) * model.weights + model.text
    )


def _rollout(model: Model) -> Need:
    """Ranks that sample a video together, by `rollout.ulysses`, have their share of its tokens each."""
    peak, degree = working(model.transformer, model.forward()), model.config.rollout.ulysses
    parts = _resting(model) | {"working": peak.alive // degree}
    return _need("rollout", parts, _rollout_host(model), (peak.reserved - peak.alive) // degree)


def _decode(model: Model) -> Need:
    """The last expert stays on the device; `rollout.decode_batch` videos are decoded at once, in fp32, and then all
    are put together."""
    video = model.config.rollout
    one = 4 * 3 * video.height * video.width * video.frames
    batch = model.forward().batch
    together = min(video.decode_batch, batch)
    peak = decode_peak(model.vae_config, model.shape, together)
    working = max(peak.alive + (batch - together) * one, 2 * batch * one)
    parts = _resting(model) | {"VAE": model.vae, "working": working}
    return _need("decode", parts, _rollout_host(model), peak.reserved - peak.alive)


def _resting(model: Model) -> dict[str, int]:
    """What lies on the device while videos are made."""
    return {"weights": model.weights, "LoRA": 4 * model.size.lora}


def _rollout_host(model: Model) -> int:
    """All experts, text encoder and VAE, and the samples of a shard between the two experts."""
    rollout = model.config.rollout
    stored = 2 * (rollout.high_steps + rollout.low_steps) + 1
    sample = state_bytes(model.shape, "float32") + stored * state_bytes(model.shape, rollout.storage_dtype)
    waiting = rollout.groups_per_shard * rollout.group_size * sample
    return len(model.layout.expert_ids) * (model.weights + 4 * model.size.lora) + model.text + model.vae + waiting


# --- Training: on many ranks, weights and their states in shards, tokens in parts -------------------------------------


def _train(model: Model, full: bool, checkpointing: bool, world: World = ALONE) -> Need:
    """One expert at work. What an optimizer step needs for a moment is as large as the weights it steps, in fp32."""
    settings, size, shards = model.config.train, model.size, _shards(world)
    trained = (size.parameters if full else size.lora) // shards
    state = {name: value // shards for name, value in _state(model, full, world).items()}
    # in full training the reference speaks before, with the base model's weights in the place of the trained ones
    reference = settings.kl_beta > 0 and not full
    run = replace(model.forward(), train=True, checkpointing=checkpointing, reference=reference)
    run = replace(run, rank=0 if full else model.rank, apart=world.size > 1)
    peak = working(model.transformer, run)
    needed = peak.alive // world.ulysses
    parts = state | {"gathered layers": _gathered(model, full) if world.size > 1 else 0}
    if checkpointing:
        forwards = 2 if run.guided else 1
        count = tokens(model.shape, model.layout.patch) // world.ulysses
        kept = min(needed, forwards * block_input_bytes(count, size, model.config.model.dtype, run.batch))
        parts, needed = {**parts, "block inputs": kept}, needed - kept
    short = 4 * trained - parts.get("block inputs", 0)
    host = _full_host(model, world) if full else _lora_host(model, world)
    gaps = (peak.reserved - peak.alive) // world.ulysses
    return _need(_train_name(full, checkpointing), {**parts, "working": max(needed, short)}, host, gaps)


def _state(model: Model, full: bool, world: World) -> dict[str, int]:
    """Weights of an expert and what training keeps beside them, whole. FSDP holds weights that learn in fp32."""
    size, dtype, average = model.size, model.config.model.dtype, model.config.train.ema > 0
    if not full:
        return {"weights": model.weights, **lora_state(size.lora, average=average)}
    if world.size > 1:
        return {"weights": 4 * size.parameters, **full_state(size.parameters, size.kept, "float32", average=average)}
    return {"weights": model.weights, **full_state(size.parameters, size.kept, dtype, average=average)}


def _gathered(model: Model, full: bool) -> int:
    """What FSDP has whole for a moment: the ends of the model, a block and the next one, and gradients of a block.

    Adapters and their gradients are fp32. In full training a block's gradients are there in the dtype of the model and,
    on their way to the other ranks, in fp32. Those of an adapter are counted once: the pass has them too.
    """
    size, dtype = model.size, model.config.model.dtype
    block = weight_bytes(size.block, dtype, size.block_kept)
    ends = model.weights - size.layers * block
    adapter = 0 if full else 4 * size.lora // size.layers
    return ends + 2 * (block + adapter) + (block + 4 * size.block if full else adapter)


def _lora_host(model: Model, world: World) -> int:
    """All experts with their adapters, the averages of those that are done, and the copy that becomes a checkpoint.

    Averages are gathered whole, by the first rank.
    """
    experts, lora = len(model.layout.expert_ids), model.size.lora
    averages = 4 * experts * lora if model.config.train.ema > 0 else 0
    return experts * (model.weights + 4 * lora) // _shards(world) + averages + _checkpoint(model, lora, world)


def _full_host(model: Model, world: World) -> int:
    """Base model, the experts that are not on the device, the rollout's weights, averages, the reference's answers.

    The weights in training make room for those of the rollout, for a moment, on the host. Sharded weights are fp32.
    """
    settings, rollout, experts = model.config.train, model.config.rollout, len(model.layout.expert_ids)
    learning = model.weights if world.size == 1 else 4 * model.size.parameters
    weights = (experts * model.weights + (experts - 1 + 2) * learning) // _shards(world)
    averages = experts * model.weights if settings.ema > 0 else 0
    steps = max(rollout.high_steps, rollout.low_steps if experts > 1 else 0)
    videos = rollout.prompts_per_iteration * rollout.group_size
    if world.size > 1:  # ranks keep those of one update
        videos = -(-videos // (world.data_parallel * settings.updates_per_rollout))
    answers = 2 * steps * videos * state_bytes(model.shape, "float32") if settings.kl_beta > 0 else 0
    return weights + averages + answers + _checkpoint(model, model.size.parameters, world)


def _checkpoint(model: Model, trained: int, world: World) -> int:
    """The copy of a rank's weights, moments and average, fp32, and its largest file in the making."""
    copy = (16 if model.config.train.ema > 0 else 12) * trained // _shards(world)
    return copy + min(copy, FILE)


def _train_name(full: bool, checkpointing: bool) -> str:
    return f"train {'all weights' if full else 'LoRA'}, {'' if checkpointing else 'no '}checkpointing"


def _need(stage: str, parts: dict[str, int], host: int, gaps: int = 0) -> Need:
    """`gaps` is what the allocator takes beyond what is alive."""
    device = sum(parts.values())
    return Need(stage, device, host, parts, device + gaps)
