"""How to use an export, for its model card: Python for diffusers that samples as `rushes eval` does, and ComfyUI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, TypedDict

from rollout.policy.folder import EXPERT_FOLDERS, Layout
from rollout.schedule import make_schedule
from shards.files import read_json
from shards.records.schedule import HIGH_NOISE, Schedule
from shards.run import EXPERT_NAMES
from shards.store.urls import last_name

if TYPE_CHECKING:
    from rollout.lora.merged import BaseLoraRecord
    from shards.config import RunConfig
    from shards.run import Run

SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "dpm-2m": "DPMSolverMultistepScheduler"}
SETTINGS = {"euler": "", "dpm-2m": 'prediction_type="flow_prediction", use_flow_sigmas=True'}
IN_COMFYUI = {"euler": "euler", "dpm-2m": "dpmpp_2m"}


class ExportWanted(TypedDict):
    """What export.json says of which export it is."""

    schema: int
    iterations: int
    policy: str
    average: bool
    fused: bool
    format: str


class ExportRecord(ExportWanted):
    """export.json."""

    base: str
    model: str
    run: str
    experts: list[str]
    lora: dict[str, str]
    """Files by expert; empty when fused."""
    checked: str
    base_lora: NotRequired[BaseLoraRecord]
    files: NotRequired[dict[str, str]]
    """sha256 of every file beside it."""


@dataclass(frozen=True)
class Base:
    """What a card must know of the model below the policy."""

    name: str
    """Its name on the hub, or that of its folder: no place on this machine."""
    pipeline: str
    """The class that its model_index.json names."""
    takes_image: bool
    plan: Schedule
    """The sampler of the evaluation."""
    train_steps: int
    """Timesteps of the model's own scheduler."""

    @classmethod
    def of(cls, run: Run, layout: Layout) -> Base:
        """The base model of a run."""
        scheduler, config = layout.scheduler_config, run.config
        return cls(
            name=public_name(config.model.path),
            pipeline=str(read_json(layout.folder / "model_index.json")["_class_name"]),
            takes_image=layout.takes_image == "must",
            plan=make_schedule(
                config.rollout, boundary=layout.boundary, scheduler_config=scheduler, evaluation=config.eval
            ),
            train_steps=int(scheduler.get("num_train_timesteps", 1000)),
        )


def public_name(path: str) -> str:
    """What others call a model: `owner/name` on the hub where the path tells it, else the name of its folder."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    on_hub = re.match(r"hf:/+([^/]+/[^/@]+)", path)
    if on_hub:
        return on_hub[1]
    return last_name(path) or path


def code(record: ExportRecord, base: Base, config: RunConfig) -> list[str]:
    """A block of Python that runs as it stands where the base model and this folder are."""
    two, plan = len(record["experts"]) == 2, base.plan
    scheduler = SCHEDULERS[plan.solver]
    numpy = ["import numpy"] if config.rollout.schedule == "shifted" else []
    lines = [*numpy, "import torch", f"from diffusers import {', '.join(sorted((scheduler, base.pipeline)))}", ""]
    if record["fused"]:
        lines.append('base = "."  # this folder')
    elif base.name == "words":
        lines.append('base = "rollout/words/model"  # the embedded model, in the repository of rushes')
    else:
        lines.append(f'base = "{base.name}"  # the base model: its folder, or its name on the hub')
    dtype = f"torch.{config.model.dtype}"
    if config.model.dtype != "float32":
        dtype = f'{{"default": {dtype}, "vae": torch.float32}}'
    lines += [f"pipe = {base.pipeline}.from_pretrained(base, dtype={dtype})", *_scheduler(base, config)]
    if not record["fused"]:
        lines += _base_lora(record, two)
        lines += [_load(record["lora"][name], name) for name in record["experts"]]
    lines.append('pipe.to("cuda" if torch.cuda.is_available() else "cpu")')
    lines.append(f"video = pipe({', '.join(_call(two, base, config))}).frames[0]")
    return ["```python", *lines, "```"]


def _scheduler(base: Base, config: RunConfig) -> list[str]:
    """A scheduler that takes the steps of the evaluation: diffusers' own solver on the sigmas of its plan."""
    plan, scheduler = base.plan, SCHEDULERS[base.plan.solver]
    shift = config.eval.shift or config.rollout.shift
    if config.rollout.schedule == "shifted":
        grid = [
            f'        line = numpy.linspace(1, 1 / {base.train_steps}, steps + 1)[:-1].astype("float32")',
            f"        sigmas = torch.from_numpy({shift!r} * line / (1 + ({shift!r} - 1) * line))",
            f"        self.timesteps = ({base.train_steps} * sigmas).to(device)",
        ]
    else:
        grid = [
            f"        sigmas = torch.tensor({list(plan.sigmas[:-1])})",
            f"        self.timesteps = torch.tensor({list(plan.timesteps)}, device=device)",
        ]
    return [
        "",
        "",
        f"class Steps({scheduler}):",
        '    """Those of the evaluation."""',
        "",
        "    def set_timesteps(self, steps, device=None):",
        "        super().set_timesteps(steps, device=device)",
        *grid,
        "        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(self.sigmas.device)",
        "",
        "",
        f"pipe.scheduler = Steps({SETTINGS[plan.solver]})",
    ]


def _base_lora(record: ExportRecord, two: bool) -> list[str]:
    """Lines that fuse the LoRA beneath; a comment where diffusers cannot read its file."""
    base_lora = record.get("base_lora")
    if base_lora is None:
        return []
    names = base_lora["names"]
    if not base_lora["plain"]:
        what = ", ".join(names.values())
        return [f"# fuse {what} here: diffusers does not read it as it is; `rushes export --fuse` merges it in"]
    parts = [EXPERT_FOLDERS[EXPERT_NAMES.index(side)] for side in names]
    return [
        "# the LoRA beneath, fused before the trained one is loaded",
        *(_load(name, side, prefix="base_") for side, name in names.items()),
        f"pipe.fuse_lora(components={parts!r}, lora_scale={base_lora['scale']:g})".replace("'", '"'),
        "pipe.unload_lora_weights()",
    ]


def _load(file: str, side: str, prefix: str = "") -> str:
    second = ", load_into_transformer_2=True" if side == EXPERT_NAMES[1] else ""
    return f'pipe.load_lora_weights("{file}", adapter_name="{prefix}{side}"{second})'


def _call(two: bool, base: Base, config: RunConfig) -> list[str]:
    """Arguments of the pipeline: those the policy was evaluated with."""
    rollout, (high, low) = config.rollout, _guidance(base, config)
    options = ["image", 'prompt="…"'] if base.takes_image else ['prompt="…"']
    if rollout.negative_prompt:
        options.append(f"negative_prompt={rollout.negative_prompt!r}")
    options += [f"height={rollout.height}", f"width={rollout.width}", f"num_frames={rollout.frames}"]
    options += [f"num_inference_steps={base.plan.steps}", f"guidance_scale={high:g}"]
    if two and low is not None:
        options.append(f"guidance_scale_2={low:g}")
    if config.model.text_length != 512:
        options.append(f"max_sequence_length={config.model.text_length}")
    return options


def _guidance(base: Base, config: RunConfig) -> tuple[float, float | None]:
    """Guidance of the high-noise (or only) and of the low-noise expert in the evaluation."""
    rollout, evaluation = config.rollout, config.eval
    high = rollout.guidance_scale if evaluation.guidance_scale is None else evaluation.guidance_scale
    low = rollout.guidance_scale_2 if evaluation.guidance_scale_2 is None else evaluation.guidance_scale_2
    return high, low


def comfyui(record: ExportRecord, base: Base, config: RunConfig) -> list[str]:
    """A section on ComfyUI: where the files belong, and the sampler that comes nearest to the evaluation."""
    plan, (high, low) = base.plan, _guidance(base, config)
    files, first = record["lora"], plan.experts.count(HIGH_NOISE)
    places = [
        f"- `{name}` behind the {side.replace('_', '-')} model" if len(files) == 2 else f"- `{name}`"
        for side, name in files.items()
    ]
    base_lora = record.get("base_lora")
    beneath = [] if base_lora is None else [
        f"Before it, load the base LoRA ({', '.join(f'`{name}`' for name in base_lora['names'].values())}) with "
        f"`strength_model` {base_lora['scale']:g}.", "",
    ]  # fmt: skip
    shares = f"cfg {high:g}"
    if len(files) == 2:
        shares = (
            f"the first {first} with the high-noise model and cfg {high:g}, the others with the low-noise model and "
        )
        shares += f"cfg {low:g}"
    return [
        "## Load it in ComfyUI",
        "",
        "Copy the files into `models/loras`, and load each with `LoraLoaderModelOnly` at `strength_model` 1.0:",
        "",
        *places,
        "",
        *beneath,
        f"Nearest to the evaluation are the sampler `{IN_COMFYUI[plan.solver]}` with the scheduler `simple`, "
        f"{plan.steps} steps ({shares}), and shift {config.eval.shift or config.rollout.shift:g} (`ModelSamplingSD3`).",
        "",
    ]
