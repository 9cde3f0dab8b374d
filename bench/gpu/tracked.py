"""Peaks of the product's own sampling step, decoding, text encoder and update, tracked by PyTorch on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh
from transformers import UMT5Config, UMT5EncoderModel

from bench.gpu.fakes import onto
from rollout.lora.adapter import add_adapter
from rollout.memory.estimate import Model
from rollout.policy import Policy, sizes
from rollout.policy.experts import ExpertWeights
from rollout.policy.folder import DTYPES
from rollout.policy.sizes import fused_attention, meta_expert
from rollout.ranks.world import World
from rollout.step import StepInputs, take_step
from shards.plan import Group, PolicyIdentity, RolloutPlan, VideoShape
from shards.records.schedule import Schedule
from train.data import Batch, Inputs, Rollouts
from train.order import Slot, Unit
from train.trainer import ExpertTrainer

aten = torch.ops.aten
GROUP = "i000000-p000000"
STEP = 2


class Tracker(MemTracker):
    """PyTorch's tracker of every storage, without its account of modules, which wants each called but once.

    What the host reads from a tensor is answered with 1, as fake tensors hold nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker: Any = _NoModules()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def peak(self, device: str) -> int:
        """Most bytes alive at once on a kind of device."""
        found = self.get_tracker_snapshot("peak")
        return sum(int(parts["Total"]) for where, parts in found.items() if where.type == device)


class _NoModules:
    """In the place of the tracker's account of modules."""

    is_bw = False

    def register_user_hooks(self, *hooks: Any) -> None: ...

    def clear_user_hooks(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class FakePolicy(Policy):
    """The policy of a model of which only the configurations are there, with one expert of fake weights."""

    def __init__(self, model: Model, device: str, blocks: int) -> None:
        settings, place = model.config.model, torch.device(device)
        experts = _FakeExperts(model, place, blocks)
        super().__init__(model.layout, settings.dtype, place, settings.text_length, experts=experts)


class _FakeExperts(ExpertWeights):
    def __init__(self, model: Model, device: torch.device, blocks: int) -> None:
        self._of, self._blocks = model, blocks
        super().__init__(model.layout, model.config.model.dtype, device)
        self.expert_ids = (0,)

    def _load_base(self) -> dict[int, nn.Module]:
        """The expert with the adapter of the run, on the meta device: peft cannot move fake tensors."""
        module = sizes._cast(meta_expert(self._of.transformer, self._blocks), self.dtype)
        add_adapter(module, self._of.rank, self._of.config.train.lora_alpha, 0)
        return {0: module}


def extrapolated(model: Model, function: Callable[[int], int], blocks: int = 2) -> int:
    """The peak with all blocks, from those with `blocks` and one more: blocks are equal."""
    fewer, more = function(blocks), function(blocks + 1)
    return fewer + (model.size.layers - blocks) * (more - fewer)


def sampling(model: Model) -> int:
    """Bytes on the device in one stochastic step with guidance, the adapter on."""

    def tracked(blocks: int) -> int:
        policy = FakePolicy(model, "cuda", blocks)
        with FakeTensorMode(allow_non_fake_inputs=True), fused_attention(), torch.no_grad():
            onto(policy.experts.module(0), "cuda")
            x, prompt, negative = _state(model, "cuda"), _text(model, "cuda"), _text(model, "cuda")
            tracker = Tracker()
            tracker.track_external(policy.experts.module(0), x, prompt, negative)
            with tracker:
                storage = DTYPES[model.config.rollout.storage_dtype]
                take_step(policy, _schedule(model), STEP, StepInputs(x, prompt, negative), torch.zeros_like(x), storage)
            return tracker.peak("cuda")

    return extrapolated(model, tracked)


def decoding(model: Model) -> int:
    """Bytes on the device while the videos of a chunk are decoded; the expert and its adapter stay there."""
    policy = FakePolicy(model, "cuda", model.size.layers)
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(model.vae_config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        onto(policy.experts.module(0), "cuda")
        policy.vae.__dict__["_vae"] = onto(vae.requires_grad_(False), "cuda")
        policy.vae.__dict__["_processor"] = SimpleNamespace(postprocess_video=_pixels)
        tracker = Tracker()
        tracker.track_external(policy.experts.module(0), vae)
        with tracker:
            policy.vae.decode(_state(model, "cpu"))
        return tracker.peak("cuda")


def _pixels(video: Tensor, output_type: str) -> Any:
    """What diffusers makes of decoded videos on the device; of their numbers there are none."""
    VideoProcessor().postprocess_video(video, "pt")
    return np.zeros(1)


def encoding(model: Model, text: Mapping[str, Any]) -> int:
    """Bytes on the device while one prompt is encoded; the experts are away."""
    policy = FakePolicy(model, "cuda", 1)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**text)).eval().requires_grad_(False).to(DTYPES[policy.dtype])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        onto(encoder, "cuda")
        ids = torch.zeros(1, policy.text.length, dtype=torch.long)
        tokens = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
        policy.text.__dict__["_text"] = (lambda *words, **options: tokens, encoder)
        tracker = Tracker()
        tracker.track_external(encoder)
        with tracker:
            policy.text.encode(["a prompt"])
        return tracker.peak("cuda")


def updating(model: Model, mesh: DeviceMesh | None = None) -> int:
    """Bytes in an update on two batches that is not the first, with everything training keeps.

    Autograd of fake CUDA tensors asks for a CUDA context, so these are fake tensors of the CPU, with the kernels that a
    GPU would take: fused attention, and AdamW over all weights at once. With a mesh FSDP holds the expert.
    """

    def tracked(blocks: int) -> int:
        policy = FakePolicy(model, "cpu", blocks)
        with FakeTensorMode(allow_non_fake_inputs=True), fused_attention():
            onto(policy.experts.module(0), "cpu")
            policy.experts.distribute(World(fsdp_mesh=mesh))
            tracker = Tracker()
            tracker.track_external(policy.experts.module(0))
            with tracker:
                trainer = _trainer(model, policy)
                slots = [Slot(unit, True) for unit in trainer.inputs.rollouts.units()]
                _have_updated(trainer)
                trainer.update([slot.unit for slot in slots], slots)
                trainer.losses.ahead.close()
            return tracker.peak("cpu")

    # on ranks the next block is gathered while one computes, and the peak is linear from three blocks on
    return extrapolated(model, tracked, blocks=2 if mesh is None else 3)


def _trainer(model: Model, policy: Policy) -> ExpertTrainer:
    """The trainer of a rollout of two batches that lies in no file."""
    rollouts = Rollouts(None, _plan(model), {0: None})  # type: ignore[arg-type, dict-item]
    inputs = Inputs(rollouts, "0a1b2c3d", dict.fromkeys(_keys(model), (1.0, 1.0)))
    trainer = ExpertTrainer(policy, inputs, model.config.train, 0)
    trainer.state.optimizer.param_groups[0]["foreach"] = True  # as it is by default on a GPU
    trainer.losses.read = lambda unit, following=None: _batch(model, unit)  # type: ignore[method-assign]
    return trainer


def _have_updated(trainer: ExpertTrainer) -> None:
    """As after the first update: the optimizer has its moments, and the policy that sampled is another one."""
    for value in trainer.state.parameters.values():
        value.grad = torch.zeros_like(value)
    trainer.state.optimizer.step()
    trainer.moved = True


def _batch(model: Model, unit: Unit) -> Batch:
    states = {name: _state(model, "cpu") for name in ("x", "x_next", "x0")}
    keys = [f"{unit.group}-s{sample:02d}" for sample in unit.samples]
    return Batch(unit, keys, states, torch.zeros(unit.size), _text(model, "cpu"), _text(model, "cpu"))


def _keys(model: Model) -> list[str]:
    return [key for chunk in _plan(model).chunks([GROUP]) for key in chunk.keys]


def _plan(model: Model) -> RolloutPlan:
    """Two chunks of one group."""
    config, batch = model.config, model.forward().batch
    video = config.rollout
    return RolloutPlan(
        schema=1, kind="rollout", iteration=0, seed=0, policy=PolicyIdentity("0" * 64, "0" * 64, {}, 0),
        schedule=_schedule(model), video=VideoShape(video.height, video.width, video.frames, video.fps, 12),
        storage_dtype=video.storage_dtype, group_size=2 * batch, batch_size=batch, negative_prompt="",
        groups=(Group(GROUP, 0, "", None, None, (STEP,)),), shards=((GROUP,),), same_initial_noise=False,
    )  # fmt: skip


def _schedule(model: Model) -> Schedule:
    config = model.config.rollout
    scale = float(config.guidance_scale)
    return Schedule(
        (1.0, 0.75, 0.5, 0.25, 0.0), (1000.0, 750.0, 500.0, 250.0), (0,) * 4, (scale,) * 4, config.law, config.form,
        config.eta, config.solver,
    )  # fmt: skip


def _state(model: Model, device: str) -> Tensor:
    return torch.zeros(model.forward().batch, *model.shape, device=device)


def _text(model: Model, device: str) -> Tensor:
    settings = model.config.model
    shape = (model.forward().batch, settings.text_length, int(model.transformer["text_dim"]))
    return torch.zeros(shape, dtype=DTYPES[settings.dtype], device=device)
