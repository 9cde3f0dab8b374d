"""The experts of a policy: in memory, sharded over ranks, with adapters or all weights of their own, on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rollout.lora.adapter import add_adapter, has_adapter, load_adapter, remove_adapter, save_adapter
from rollout.lora.find import LoraFile, Start, hashes_of, policy_files
from rollout.lora.merged import BaseLora
from rollout.policy.folder import EXPERT_FOLDERS, Layout, fingerprint_folder, load_transformer
from rollout.policy.full import full_hashes, is_full, load_full, save_full
from rollout.policy.kernels.arithmetic import adapters_of, check_arithmetic, set_arithmetic
from rollout.policy.offload import Offload
from rollout.policy.sharding import Experts, backwards, check_ulysses, distribute
from rollout.ranks.backwards import Backwards
from rollout.ranks.world import World, full
from shards.files import canonical_sha256
from shards.plan import Arithmetic
from shards.run import EXPERT_NAMES


class Identity(TypedDict):
    """Which policy it is."""

    fingerprint: str
    base: str
    """Fingerprint of the model beneath, a base LoRA included."""
    adapters: dict[str, str]
    """sha256 of its files, by their paths in its folder."""


class ExpertWeights:
    """One or two transformers, what is trained of them, and which of them is on the device."""

    def __init__(self, layout: Layout, dtype: str, device: torch.device, base_lora: BaseLora | None = None) -> None:
        self.layout, self.dtype, self.device, self.base_lora = layout, dtype, device, base_lora
        self._offload = Offload(device)
        self.expert_ids = layout.expert_ids
        self.start: Start | None = None
        self.arithmetic = Arithmetic(adapters=adapters_of(dtype))
        self._experts = self._load_base()
        self._bases: dict[int, nn.Module] = {}  # the base model's experts, while the policy has its own of all weights
        self._active: int | None = None
        self._sharded: Experts | None = None  # the experts as one module of FSDP, once they are distributed
        self._sharded_bases: Experts | None = None
        self._backwards: Backwards | None = None  # of the sharded experts
        self._dtypes: dict[int, dict[str, torch.dtype]] = {}
        self._world = World()

    # --- Experts and where they are ----------------------------------------------------------------------------------

    def module(self, expert: int) -> nn.Module:
        """The transformer of an expert, wherever it is."""
        return self._experts[expert]

    def trainable(self, expert: int) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of an expert that take gradients: the adapter's, or all in full training."""
        return [(name, value) for name, value in self._experts[expert].named_parameters() if value.requires_grad]

    def use(self, expert: int | None) -> None:
        """Only this expert on the device; None sends both away. On a CPU nothing moves."""
        for other, module in self._experts.items():
            if other != expert:
                self._offload.leave(module)
        if expert is not None:
            self._offload.enter(self._experts[expert])
        self._active = expert

    def compute_as(self, arithmetic: Arithmetic) -> None:
        """Compute from now on as a plan says. Raises UserError for what this machine, or this model, cannot."""
        if arithmetic == self.arithmetic:
            return
        assert self._sharded is None, "what is compiled is compiled before it is distributed"
        check_arithmetic(arithmetic, self.layout, self.dtype, self.device)
        self.arithmetic = arithmetic
        for module in (*self._experts.values(), *self._bases.values()):
            set_arithmetic(module, arithmetic)

    def distribute(self, world: World) -> None:
        """Shard the experts, and the base model's beside them, over ranks; without a mesh they stay as they are.

        What is to be trained must be on them by now. `become` gives each rank plain experts again.
        """
        if world.fsdp_mesh is None:
            return
        assert self._sharded is None, "experts are distributed once"
        self.use(None)
        self._world = world
        self._dtypes = {expert: self.dtypes(expert) for expert in self.expert_ids}
        self._sharded = distribute(self._experts, world)
        self._sharded_bases = distribute(self._bases, world) if self._bases else None
        self._backwards = backwards(self._sharded)
        for module in (*self._experts.values(), *self._bases.values()):
            self._offload.leave(module)

    def check_ulysses(self, height: int, width: int, frames: int, world: World) -> None:
        """UserError when the heads or the tokens of a video of that size cannot be shared by `world.ulysses` ranks."""
        check_ulysses(self._experts[0], self.layout.latent_shape(height, width, frames), world)

    def dtypes(self, expert: int) -> dict[str, torch.dtype]:
        """The dtypes a forward computes with, by the names of the weights that learn."""
        return self._dtypes.get(expert) or {name: value.dtype for name, value in self.trainable(expert)}

    def gather(self, expert: int) -> dict[str, Tensor]:
        """The weights that learn, whole, on the host of the first rank, in the dtypes they compute with; else empty."""
        self.use(expert)
        found = {}
        for name, value in self.trainable(expert):
            whole = full(value.detach())  # by all ranks at once
            if self._world.is_first:
                found[name] = whole.to(self.dtypes(expert)[name]).cpu()
        return found

    def forward(self, expert: int, *inputs: Tensor) -> Tensor:
        """The transformer's answer to latents, timesteps and embeddings."""
        if self._sharded is not None:
            assert self._backwards is not None
            return self._backwards.cut(self._sharded(expert, *inputs))
        out: Tensor = self._experts[expert](*inputs, return_dict=False)[0]
        return out

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss of forwards: with sharded weights in one backward pass per forward."""
        if self._backwards is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._backwards.run(loss)

    # --- Adapters and identity ---------------------------------------------------------------------------------------

    @property
    def has_lora(self) -> bool:
        """Whether any expert carries an adapter."""
        return any(has_adapter(module) for module in self._experts.values())

    def add_lora(self, rank: int, alpha: float, seed: int) -> None:
        """Fresh adapters on every expert without one; the same `seed` gives the same weights.

        Until trained they change nothing.
        """
        self.use(None)
        for expert, module in self._experts.items():
            if not has_adapter(module):
                add_adapter(module, rank, alpha, seed + expert)
                set_arithmetic(module, self.arithmetic)

    def load_lora(self, source: str | Path | Mapping[int, LoraFile]) -> None:
        """Put on the adapters of a policy folder, or of files. UserError when they are missing or of another model."""
        self.use(None)
        files = source if isinstance(source, Mapping) else policy_files(Path(source), self.expert_ids)
        for expert, module in self._experts.items():
            if expert in files:
                load_adapter(module, files[expert])
                set_arithmetic(module, self.arithmetic)
            else:  # `model.lora` names one of the other expert alone
                remove_adapter(module)

    def save_lora(self, folder: str | Path) -> None:
        """Write FOLDER/high_noise (and low_noise) as diffusers does."""
        for expert, module in self._experts.items():
            save_adapter(module, Path(folder) / EXPERT_NAMES[expert])

    def train_all(self) -> None:
        """Let every weight of every expert take gradients. The base model stays beside them in host memory, frozen.

        That copy is the reference policy and costs what the base weights cost: 28 GB for each 14B expert in bfloat16.
        """
        assert not self.has_lora, "an adapter is trained instead of the weights, not with them"
        if not self._bases:
            self._replace(self._load_base())
        for module in self._experts.values():
            module.requires_grad_(True)

    @property
    def is_full(self) -> bool:
        """Whether the policy has all weights of its own, not adapters on those of the base model."""
        return bool(self._bases)

    def save(self, folder: Path, expert: int, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what was trained of an expert: its adapter, or its whole transformer folder, to FOLDER/high_noise.

        `state` are other weights to be written instead, whole, by the names of those that learn. Of many ranks, all of
        which must call this, the first one writes.
        """
        if state is None and self._sharded is not None:
            state = self.gather(expert)
        with self._world.together():
            if self._world.is_first:
                self._write(self._experts[expert], folder, expert, state)

    def _write(self, module: nn.Module, folder: Path, expert: int, state: Mapping[str, Tensor] | None) -> None:
        if self.is_full:
            save_full(module, folder / EXPERT_NAMES[expert], self.layout.folder / EXPERT_FOLDERS[expert], state)
        else:
            save_adapter(module, folder / EXPERT_NAMES[expert], state)

    def become(self, folder: Path | None) -> None:
        """Take on the adapters or the transformers of a policy folder; which, its files tell.

        None is the policy as loaded: the base model, or `model.lora`. Raises UserError for what is not of this model.
        """
        self.use(None)
        if self._sharded is not None:
            self._undo_distribute()
        source, files = self._source(folder)
        if files is None and source is not None:
            self._drop_adapters()
            return self._replace(load_full(self.layout, source, self.dtype, self.device))
        if self._bases:
            self._experts, self._bases = self._bases, {}
        if files is not None:
            return self.load_lora(files)
        self._drop_adapters()

    def _source(self, folder: Path | None) -> tuple[Path | None, Mapping[int, LoraFile] | None]:
        """(folder of whole transformers, None), (None, adapters), or twice None for the base model alone."""
        if folder is None:
            start = self.start or Start(None, None)
            return (None, start.files) if start.files is not None else (start.folder, None)
        return (folder, None) if is_full(folder) else (None, policy_files(folder, self.expert_ids))

    def _undo_distribute(self) -> None:
        """The base model's experts, plain, from its folder: a rank alone has only its shards of them."""
        self._sharded = self._sharded_bases = self._backwards = None
        self._dtypes, self._bases, self._world = {}, {}, World()
        self._experts = self._load_base()

    def _load_base(self) -> dict[int, nn.Module]:
        """The experts of the base model in memory of their own, `model.base_lora` merged into them."""
        found = {}
        for expert in self.expert_ids:
            found[expert] = load_transformer(self.layout, expert, self.dtype, self.device)
            if self.base_lora is not None:
                self.base_lora.merge(found[expert], expert)
            set_arithmetic(found[expert], self.arithmetic)
        return found

    def _replace(self, experts: dict[int, nn.Module]) -> None:
        """Put other weights in the place of the base model's, which are kept."""
        self.use(None)
        self._bases = self._bases or self._experts
        self._experts = experts
        for module in experts.values():
            set_arithmetic(module, self.arithmetic)

    def _drop_adapters(self) -> None:
        for module in self._experts.values():
            remove_adapter(module)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The reference policy: inside, the base model speaks, and what was trained is off.

        Adapters are switched off in the layers and not by peft's own call, which would also stop their gradients. A
        fully trained expert leaves the device for the base model's: one swap, so ask for many velocities at once.
        """
        with self._bases_in_place() if self.is_full else self._adapters_off():
            yield

    @contextlib.contextmanager
    def _bases_in_place(self) -> Iterator[None]:
        trained, active = (self._experts, self._sharded), self._active
        self.use(None)
        self._experts, self._sharded = self._bases, self._sharded_bases
        self.use(active)
        try:
            yield
        finally:
            self.use(None)
            self._experts, self._sharded = trained
            self.use(active)

    @contextlib.contextmanager
    def _adapters_off(self) -> Iterator[None]:
        modules = [module for expert in self._experts.values() for module in expert.modules()]
        layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, state in zip(layers, before, strict=True):
                layer._disable_adapters = state

    @cached_property
    def model_fingerprint(self) -> str:
        """sha256 (hex) of the model folder: names and contents of every weight and configuration file."""
        return fingerprint_folder(self.layout)

    @cached_property
    def base_fingerprint(self) -> str:
        """That of the base model: of its folder, and, where there is one, of the LoRA merged into it."""
        if self.base_lora is None:
            return self.model_fingerprint
        return canonical_sha256({"model": self.model_fingerprint, "lora": self.base_lora.identity()})

    def fingerprint(self, policy_dir: str | Path | None) -> Identity:
        """Identity of base and policy: {"fingerprint", "base", "adapters": {path in the folder: sha256}}.

        After full training `adapters` names the files of the transformers instead. None stands for the policy as
        loaded. Raises UserError when the folder lacks a file.
        """
        folder, files = self._source(None if policy_dir is None else Path(policy_dir))
        adapters = {} if folder is None else full_hashes(folder, self.expert_ids)
        if files is not None:
            adapters = hashes_of(files)
        return self.identity(adapters)

    def identity(self, adapters: Mapping[str, str]) -> Identity:
        """That of a policy whose files have these sha256, by their paths in its folder."""
        base, named = self.base_fingerprint, dict(adapters)
        fingerprint = canonical_sha256({"base": base, "adapters": named})
        return {"fingerprint": fingerprint, "base": base, "adapters": named}

    def hashes(self, folder: Path, expert: int) -> dict[str, str]:
        """sha256 of the files that `save` wrote of an expert, by their paths in the folder."""
        experts = (expert,)
        return full_hashes(folder, experts) if self.is_full else hashes_of(policy_files(folder, experts))
