"""Every knob of a run on one page: the typed content of `run.toml`, with the unit and the source of each default."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shards.plan import Compile, Dtype, VideoPreset
from shards.records.schedule import Form, Law, Solver

SCHEMA = 1

SigmaGrid = Literal["shifted", "unipc", "euler"]
Window = Literal["random", "fixed", "progressive"]
Objective = Literal["grpo", "nft", "dpo", "sft"]
Estimator = Literal["noise", "endpoint", "fresh"]
AtOnce = Literal["auto", True, False]
ErrorWeight = Literal["derived", "calibrated", "velocity", "adaptive"]


class Section(BaseModel):
    """One table of `run.toml`: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """[model]: which Wan folder, and how it is loaded. Rollout and training load it the same way."""

    path: str = Field("words", description="folder in WanPipeline layout, hub id, or `words`, the embedded model")
    dtype: Dtype = Field("float32", description="weights of the transformers; bfloat16 on a GPU (Wan's own choice)")
    device: str = Field("auto", description="`auto` takes cuda when there is one, else cpu")
    attention: str = Field("auto", description="attention backend, by diffusers' name; `auto` is PyTorch's own choice")
    compile: Compile = Field(
        False, description="`blocks` compiles the transformer's blocks (torch.compile), once a run"
    )
    merge_lora: bool = Field(
        False,
        description="add LoRA to the weights at every forward: faster for few tokens, in fp32; needs a copy of them",
    )
    text_length: int = Field(512, ge=1, description="text tokens the model was trained with (Wan: 512)")
    lora: str = Field("", description="LoRA to start from: a file, folder, URL or hub id (docs/lora.md has the forms)")
    lora_2: str = Field("", description="that of the low-noise expert, where model.lora is one file, or `none`")
    base_lora: str = Field("", description="LoRA merged into the model and kept as it is, such as a few-step one")
    base_lora_2: str = Field("", description="that of the low-noise expert, likewise, or `none`")
    base_lora_scale: float = Field(1.0, description="strength of model.base_lora")


class RolloutConfig(Section):
    """[rollout]: what is sampled, and the law that samples it."""

    prompts: str = Field("words", description="prompts file, also at a URL, or `words`: those of the embedded model")
    prompt_column: str = Field(
        "prompt", min_length=1, description="field of the prompts in a JSON-lines, CSV or Parquet file"
    )
    negative_prompt: str = Field("", description="the other side of guidance (flow_grpo: empty)")
    seed: int = Field(0, ge=0, lt=2**63, description="run seed; every noise tensor is derived from it")
    prompts_per_iteration: int = Field(
        16, ge=1, description="groups in one iteration (DanceGRPO issue 16: at least 16)"
    )
    group_size: int = Field(
        16, ge=2, le=1000, description="videos of one prompt; advantages are taken among them (8 or more)"
    )
    height: int = Field(240, ge=1, description="pixels (flow_grpo's Wan recipe)")
    width: int = Field(416, ge=1, description="pixels (flow_grpo's Wan recipe)")
    frames: int = Field(33, ge=1, description="frames of a video, 4k+1 (flow_grpo's Wan recipe)")
    fps: int = Field(16, ge=1, description="frames per second written into the video (Wan2.1 and A14B: 16)")
    steps: int = Field(20, ge=2, le=1000, description="denoising steps (flow_grpo's Wan recipe)")
    schedule: SigmaGrid = Field("shifted", description="sigma grid: shifted linear, or the model's UniPC or Euler grid")
    shift: float = Field(3.0, ge=1e-3, le=1e3, description="flow shift of the grid (480p and less: 3, 720p: 5)")
    law: Law = Field("flow-sde", description="law of the stochastic steps (Flow-GRPO)")
    form: Form = Field("euler-maruyama", description="as published, or `exact`, which keeps the marginals")
    eta: float = Field(0.7, ge=0, le=100, description="noise level of the law (Flow-GRPO, GenRL: 0.7)")
    solver: Solver = Field("euler", description="deterministic solver of the other steps")
    window: Window = Field("random", description="how the stochastic steps of a group are chosen")
    high_steps: int = Field(
        2, ge=0, description="stochastic steps of a group on the high-noise expert (or the only one)"
    )
    low_steps: int = Field(1, ge=0, description="stochastic steps of a group on the low-noise expert")
    window_iterations: int = Field(
        1, ge=1, description="iterations a progressive window stays where it is (MixGRPO: 25 updates)"
    )
    first_step: int = Field(1, ge=0, description="first step a window may take; step 0 is nearly pure noise")
    last_step: int | None = Field(
        None, ge=0, description="last step a window may take (flow_grpo's fast variant: in the first half)"
    )
    allow_untrained_expert: bool = Field(False, description="accept a window that never reaches one of two experts")
    same_initial_noise: bool = Field(False, description="one initial noise for all videos of a group")
    guidance_scale: float = Field(4.5, ge=0, le=1000, description="guidance of the high-noise expert, or the only one")
    guidance_scale_2: float | None = Field(
        None, ge=0, le=1000, description="guidance of the low-noise expert; needed with two experts"
    )
    storage_dtype: Dtype = Field("float32", description="dtype of stored latents; the loop rounds to it at every step")
    batch_size: int = Field(
        1, ge=1, description="videos of a group in one forward pass; training replays the same batches"
    )
    batch_tokens: int | None = Field(
        None, ge=1, description="most tokens in one forward pass; the plan makes the batch size of it, not batch_size"
    )
    batch_guidance: bool = Field(
        False, description="both forwards of guidance in one batch, twice as large; faster where a GPU has few tokens"
    )
    decode_batch: int = Field(
        1, ge=1, description="videos of a group that the VAE decodes at once; faster for small videos, in more memory"
    )
    groups_per_shard: int = Field(1, ge=1, description="groups in one shard; a shard of 0.5 to 2 GB is a good size")
    workers: int = Field(1, ge=1, description="processes that sample at once, each with the whole model: for a CPU")
    ulysses: int = Field(
        1, ge=1, description="ranks that sample a video together, when one GPU cannot hold it; divides heads and tokens"
    )
    video_crf: int = Field(
        12, ge=0, le=51, description="H.264 quality of the stored video; above 18 small text suffers"
    )
    video_preset: VideoPreset = Field(
        "medium", description="x264's preset: a faster one takes less of the processor and, as a rule, larger files"
    )


class ScoreConfig(Section):
    """[score]: the rewards, and how advantages follow from them."""

    rewards: dict[str, float] = Field({"ocr": 1.0}, description="weight of each reward, or of reward.component")
    options: dict[str, dict[str, object]] = Field({}, description="options of a reward, by its name")
    combine: Literal["normalise-first", "sum-first"] = Field(
        "normalise-first", description="normalise each reward in its group and then weight (GenRL), or the reverse"
    )
    spread: Literal["group", "global", "largest-group"] = Field(
        "group", description="standard deviation that divides an advantage (UniRL: global, GenRL: largest-group)"
    )
    min_spread: float = Field(
        1e-4, ge=0, description="groups with a smaller standard deviation are dropped and counted"
    )
    best_of_n: int = Field(
        0, ge=0, multiple_of=2, description="keep the n/2 best and n/2 worst of a group; 0 keeps all"
    )
    max_missing: float = Field(0.2, ge=0, le=1, description="share of missing rewards above which the stage stops")
    workers: int = Field(1, ge=1, description="processes that score at once, one torch thread each")

    def specification(self) -> dict[str, object]:
        """How advantages follow from scores, as `_summary.json` of a specification of advantages says it."""
        names = ("combine", "spread", "min_spread", "best_of_n")
        return {"weights": dict(self.rewards), **{name: getattr(self, name) for name in names}}

    @field_validator("rewards", mode="before")
    @classmethod
    def _flat(cls, rewards: object) -> object:
        """`videoalign.VQ = 1.0` is a table inside a table to TOML; here it is the name of a component."""
        if not isinstance(rewards, dict):
            return rewards
        inner = {name: value if isinstance(value, dict) else {"": value} for name, value in rewards.items()}
        return {f"{name}.{part}" if part else name: v for name, parts in inner.items() for part, v in parts.items()}


class TrainConfig(Section):
    """[train]: the updater."""

    objective: Objective = Field(
        "grpo", description="policy gradient (grpo), DiffusionNFT, preference pairs (dpo), best of each group (sft)"
    )
    estimator: Estimator = Field(
        "noise", description="grpo: pull to a step's own noise (as published), the video's endpoint, or fresh noise"
    )
    error_weight: ErrorWeight = Field(
        "derived", description="grpo: weight of a step's error for endpoint and fresh; noise has the derived one"
    )
    proximal: float = Field(
        0.0, ge=0, le=1e6, description="grpo: hold on the policy that sampled, lambda; 0 is the clipped ratio alone"
    )
    proximal_2: float | None = Field(None, ge=0, le=1e6, description="of the low-noise expert; the same when absent")
    full: bool = Field(False, description="train all weights instead of LoRA")
    lora_rank: int = Field(64, ge=1, description="LoRA rank (miles, Pref-GRPO)")
    lora_alpha: float = Field(128.0, gt=0, description="LoRA alpha, twice the rank (miles)")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW (LoRA: 1e-4, full: 1e-5; flow_grpo, GenRL, miles)")
    learning_rate_2: float | None = Field(None, gt=0, description="of the low-noise expert; the same when absent")
    warmup: int = Field(0, ge=0, description="updates over which the learning rate rises from 0")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW")
    epsilon: float = Field(1e-15, gt=0, description="AdamW; 1e-8 froze learning at gradients of 5e-9 (UniRL issue 407)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW (peers 0; DanceGRPO 1e-4)")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, per expert")
    updates_per_rollout: int = Field(2, ge=1, description="optimizer steps of each expert per iteration (UniRL, miles)")
    clip_range: float = Field(1e-3, gt=0, description="of the ratio of mean log-probs (LoRA 1e-3, full 1e-4)")
    advantage_clip: float = Field(5.0, gt=0, description="largest absolute advantage (flow_grpo, DanceGRPO)")
    kl: Literal["velocity", "transition"] = Field("velocity", description="what is compared with the reference policy")
    kl_beta: float = Field(
        4e-4, ge=0, description="weight of that distance (flow_grpo: 4e-4 of the velocity, 0.004 of a transition)"
    )
    step_weight: Literal["none", "std", "inverse-gradient"] = Field("none", description="weight of a step in the loss")
    ratio_norm: bool = Field(False, description="RatioNorm of GRPO-Guard; needs its clip_range of 2e-6 to 4e-6")
    nft_beta: float = Field(1.0, gt=0, le=1e6, description="mixing of DiffusionNFT's implicit policies")
    pairs: Literal["best-worst", "margin"] = Field(
        "margin", description="dpo: the best against the worst of a group, or all pairs beyond pair_margin"
    )
    pair_margin: float = Field(1.0, ge=0, description="dpo: smallest difference of two advantages that makes a pair")
    dpo_beta: float = Field(
        2000.0, gt=0, le=1e9, description="dpo: inverse temperature of the errors (Diffusion-DPO: 2000 to 5000)"
    )
    dpo_sft: float = Field(0.0, ge=0, le=1e9, description="dpo: weight of the winners' own error (Reg-DPO)")
    sft_best: int = Field(4, ge=1, description="sft: videos of a group that are trained on, the best ones")
    sft_weight: Literal["equal", "advantage"] = Field(
        "advantage", description="sft: weight of each of them; by advantage only those above the mean count"
    )
    ema: float = Field(
        0.9, ge=0, lt=1, description="decay per update of the weights used for evaluation; 0 turns it off"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    ulysses: int = Field(
        1, ge=1, description="ranks that share each token sequence; divides the model's heads and tokens"
    )
    replicate: int = Field(1, ge=1, description="copies of the sharded weights (HSDP); 1 shards them over all ranks")
    replay_samples: int = Field(
        8, ge=1, description="transitions of each expert and shard proven before the first update"
    )
    replay_limit: float = Field(
        1e-5, ge=0, description="largest |log-ratio| the gate accepts on a GPU or under Ulysses; on a CPU it is 0"
    )
    recompute_log_probs: bool = Field(
        False, description="take old log-probs from this machine, for shards of other hardware"
    )
    max_policy_lag: int = Field(
        0,
        ge=0,
        description="how many policies old shards may be; all but the published ratio then take their start for it",
    )
    experts_at_once: AtOnce = Field(
        "auto", description="two experts in a process each: where a second one, or GPU, is there (auto), always, never"
    )
    save_every: int = Field(1, ge=1, description="updates between trainer checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="trainer checkpoints kept of each expert and iteration")
    async_checkpoints: bool = Field(True, description="train on while they are written, from a copy in host memory")

    @property
    def is_published(self) -> bool:
        """Whether the loss is the clipped ratio of stored log-probs, as Flow-GRPO and DanceGRPO published it."""
        held = self.proximal or self.proximal_2
        return self.objective == "grpo" and self.estimator == "noise" and not held


class EvalConfig(Section):
    """[eval]: fixed prompts and seeds, a deterministic sampler."""

    prompts: str = Field("words", description="prompts file, also at a URL, or `words`: the embedded model's held-out")
    prompt_column: str = Field("prompt", min_length=1, description="field of the prompts in that file, as in rollout")
    holdout: float = Field(
        0.0, ge=0, lt=1, description="share of prompts that is only evaluated; rollout and eval then name one file"
    )
    limit: int = Field(64, ge=1, description="prompts taken from the head of the file")
    videos_per_prompt: int = Field(1, ge=1, le=1000, description="seeds of each prompt")
    seed: int = Field(12345, ge=0, lt=2**63, description="seed of the evaluation noise, the same for every policy")
    steps: int = Field(50, ge=2, le=1000, description="denoising steps (flow_grpo's Wan recipe)")
    solver: Solver = Field("euler", description="deterministic solver")
    shift: float | None = Field(None, ge=1e-3, le=1e3, description="flow shift; that of rollout when absent")
    guidance_scale: float | None = Field(
        None, ge=0, le=1000, description="high-noise guidance; that of rollout when absent"
    )
    guidance_scale_2: float | None = Field(
        None, ge=0, le=1000, description="low-noise guidance; that of rollout when absent"
    )
    ema: bool = Field(True, description="evaluate the averaged weights, when training keeps them")


class TrackConfig(Section):
    """[track]: where metrics go while a stage works."""

    to: list[str] = Field(
        [], description="trackers, by accelerate's names (tensorboard, wandb, mlflow, …) or your own as module:Class"
    )


class WorkersConfig(Section):
    """[workers]: how processes that share a run directory keep out of each other's way."""

    claim_seconds: float = Field(
        60.0, ge=0, description="s without a sign of life after which a shard is taken from its worker; 0: no claims"
    )


class RunConfig(Section):
    """The whole of `run.toml`."""

    schema_version: int = Field(
        SCHEMA, ge=SCHEMA, le=SCHEMA, alias="schema", description="version of the run directory"
    )
    preset: str = Field("", description="the preset this run began from")
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    score: ScoreConfig = ScoreConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    workers: WorkersConfig = WorkersConfig()
    track: TrackConfig = TrackConfig()
