"""The plan: grids equal to the schedulers', experts, guidance, windows, and every refusal with its hint."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import transitions as tr
from rollout.schedule import describe, expert_ids, make_schedule
from rollout.window import choose_window
from shards.config import EvalConfig, RolloutConfig
from shards.errors import UserError
from shards.records.schedule import Schedule
from tests.support.shard_fixtures import make_plan, plan_of

UNIPC = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "solver_order": 2, "use_flow_sigmas": True}


def config(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"steps": 10, "shift": 5.0, "guidance_scale": 4.0, "guidance_scale_2": 3.0, **changes})


def two_experts(settings: RolloutConfig, boundary: float = 0.875) -> Schedule:
    return make_schedule(settings, boundary=boundary, scheduler_config=UNIPC)


def one_expert(settings: RolloutConfig) -> Schedule:
    return make_schedule(settings, boundary=None, scheduler_config=UNIPC)


# --- grids --------------------------------------------------------------------------------------------------------


@given(steps=st.integers(2, 60), shift=st.floats(0.5, 16.0))
@settings(max_examples=60, deadline=None)
def test_shifted_grid_equals_flow_match_euler_bit_for_bit(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, steps + 1)[:-1].tolist())
    plan = one_expert(config(steps=steps, shift=shift))
    assert list(plan.sigmas) == scheduler.sigmas.tolist()
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    assert plan.sigmas[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(10, 3.0), (20, 5.0), (40, 12.0)])
def test_unipc_grid_is_that_of_the_scheduler(steps, shift):
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    plan = one_expert(config(steps=steps, shift=shift, schedule="unipc"))
    assert list(plan.sigmas) == scheduler.sigmas.tolist()
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    assert plan.sigmas[0] < 1
    assert all(t == int(t) for t in plan.timesteps)


def test_unipc_grid_does_not_need_a_unipc_folder():
    euler_folder = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
    settings = config(schedule="unipc")
    assert make_schedule(settings, boundary=None, scheduler_config=euler_folder) == one_expert(settings)


@pytest.mark.parametrize(("steps", "shift"), [(10, 3.0), (40, 12.0)])
def test_euler_grid_is_that_of_the_scheduler(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    plan = one_expert(config(steps=steps, shift=shift, schedule="euler"))
    assert list(plan.sigmas) == scheduler.sigmas.tolist()
    assert list(plan.timesteps) == scheduler.timesteps.tolist()


def test_shifted_and_unipc_differ_by_the_rounding_of_the_scheduler_only():
    shifted, unipc = one_expert(config()), one_expert(config(schedule="unipc"))
    np.testing.assert_allclose(shifted.sigmas, unipc.sigmas, atol=2e-6)
    assert 0 < max(abs(a - b) for a, b in zip(shifted.timesteps, unipc.timesteps, strict=True)) <= 1.001


# --- experts and guidance -----------------------------------------------------------------------------------------


def ideal_timesteps(steps: int, shift: float) -> list[float]:
    line = np.linspace(1.0, 0.0, steps + 1)[:-1]
    return (1000 * shift * line / (1 + (shift - 1) * line)).tolist()


@pytest.mark.parametrize(
    ("boundary", "shift", "counts"),
    [
        (0.875, 3.0, {16: 5, 20: 6, 40: 12}),
        (0.875, 5.0, {10: 5, 16: 7, 20: 9, 40: 17}),
        (0.875, 8.0, {10: 6, 20: 11, 40: 22}),
        (0.875, 12.0, {8: 6, 10: 7, 16: 11, 20: 13, 40: 26}),
        (0.900, 3.0, {10: 3, 20: 6, 40: 11}),
        (0.900, 5.0, {8: 3, 10: 4, 16: 6, 20: 8, 40: 15}),
        (0.900, 12.0, {10: 6, 20: 12, 40: 23}),
    ],
)
def test_number_of_high_noise_steps_on_the_ideal_line(boundary, shift, counts):
    got = {steps: expert_ids(ideal_timesteps(steps, shift), boundary).count(0) for steps in counts}
    # At shift 3 and a number of steps that 10 divides a step falls on .875 but for its rounding: either side is right.
    ties = {steps for steps in counts if min(abs(t - 1000 * boundary) for t in ideal_timesteps(steps, shift)) < 1e-6}
    assert {steps: got[steps] for steps in counts if steps not in ties} == {
        steps: counts[steps] for steps in counts if steps not in ties
    }
    assert all(got[steps] - counts[steps] in (0, 1) for steps in ties)


@pytest.mark.parametrize(
    ("boundary", "shift", "steps", "high"),
    [(0.875, 12.0, 40, 26), (0.875, 3.0, 40, 13), (0.900, 3.0, 40, 11), (0.900, 5.0, 40, 15), (0.875, 12.0, 10, 7)],
)
@pytest.mark.parametrize("schedule", ["shifted", "unipc"])
def test_number_of_high_noise_steps_of_the_real_grids(boundary, shift, steps, high, schedule):
    plan = two_experts(config(steps=steps, shift=shift, schedule=schedule), boundary)
    assert plan.experts == (0,) * high + (1,) * (steps - high)


def test_the_boundary_itself_belongs_to_the_high_noise_expert():
    assert expert_ids([1000.0, 875.0, 874.99994, 0.5], 0.875) == (0, 0, 1, 1)
    assert expert_ids([900.0, 899.99994], 0.9) == (0, 1)
    assert expert_ids([1000.0, 0.1], None) == (0, 0)


def test_guidance_follows_the_expert():
    plan = two_experts(config(guidance_scale=4.1))
    assert plan.guidance == tuple(float(np.float32(4.1)) if e == 0 else 3.0 for e in plan.experts)
    assert one_expert(config(guidance_scale_2=None)).guidance == (4.0,) * 10


def test_two_experts_need_two_guidance_scales():
    with pytest.raises(UserError, match=r"rollout.guidance_scale_2 is not set.*hint.*3\.0"):
        two_experts(config(guidance_scale_2=None))


def test_evaluation_plan_is_deterministic_and_falls_back_to_rollout():
    evaluation = EvalConfig(steps=30, solver="dpm-2m", guidance_scale_2=1.5)
    plan = make_schedule(config(eta=0.0), boundary=0.875, scheduler_config=UNIPC, evaluation=evaluation)
    assert (plan.steps, plan.law, plan.form, plan.eta, plan.solver) == (30, "ode", "exact", 0.0, "dpm-2m")
    assert set(plan.guidance) == {4.0, 1.5}
    assert plan.sigmas == one_expert(config(steps=30)).sigmas
    other = make_schedule(config(), boundary=None, scheduler_config=UNIPC, evaluation=EvalConfig(steps=30, shift=12.0))
    assert other.sigmas == one_expert(config(steps=30, shift=12.0)).sigmas
    assert choose_window(plan, config(), iteration=-1, prompt_id=3) == ()


# --- the schedule as a record -------------------------------------------------------------------------------------


@given(
    steps=st.integers(4, 60),
    shift=st.floats(0.5, 16.0),
    guidance=st.floats(0, 20),
    law=st.sampled_from(["ode", "flow-sde", "dance-sde", "wan-sde", "cps", "dpm-sde", "dpm-sde-2m"]),
    eta=st.floats(0.01, 1),
)
@settings(max_examples=40, deadline=None)
def test_a_schedule_survives_json_bit_for_bit(steps, shift, guidance, law, eta):
    schedule = one_expert(config(steps=steps, shift=shift, guidance_scale=guidance, law=law, eta=eta))
    again = plan_of(make_plan() | {"sampler": asdict(schedule), "groups": [], "shards": []}).schedule
    assert again == schedule
    stored = np.asarray(schedule.sigmas, dtype=np.float32)
    assert stored.tolist() == list(schedule.sigmas)


def test_every_setting_of_the_sampler_makes_another_schedule():
    settings = config()
    schedule = two_experts(settings)
    changes = [{"steps": 11}, {"shift": 3.0}, {"law": "cps"}, {"form": "exact"}, {"eta": 0.8}, {"solver": "dpm-2m"}]
    changes += [{"guidance_scale": 5.0}, {"guidance_scale_2": 5.0}, {"schedule": "unipc"}]
    others = [two_experts(config(**change)) for change in changes] + [two_experts(settings, 0.9)]
    assert len({schedule, *others}) == len(others) + 1
    assert two_experts(config(seed=5, high_steps=1)) == schedule


def test_a_law_with_one_form_is_recorded_in_it():
    assert one_expert(config(law="cps", form="euler-maruyama")).form == "exact"
    assert one_expert(config(law="flow-sde", form="euler-maruyama")).form == "euler-maruyama"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sigmas", (1.0, 0.5, 0.6, 0.0), "fall strictly"),
        ("sigmas", (1.0, 0.5, 0.3, 0.1), "down to 0"),
        ("sigmas", (1.0, 0.5, 0.0), "3 timesteps, 3 sigmas"),
        ("timesteps", (1000.0, float("nan"), 250.0), "finite fp32"),
        ("timesteps", (1000.0, 500.1, 250.0), "finite fp32"),
        ("guidance", (1.0, 1.0, 1e300), "finite fp32"),
        ("experts", (0, 0, 2), "experts must be 0 or 1"),
        ("law", "flow", "unknown law 'flow'"),
        ("solver", None, "unknown solver None"),
    ],
)
def test_a_schedule_whose_parts_do_not_fit_is_refused(key, value, message):
    good = {"sigmas": (1.0, 0.5, 0.25, 0.0), "timesteps": (1000.0, 500.0, 250.0), "experts": (0, 0, 1)}
    good |= {"guidance": (1.0, 1.0, 1.0), "law": "cps", "form": "exact", "eta": 0.5, "solver": "euler"}
    assert Schedule(**good).steps == 3
    with pytest.raises(UserError, match=message):
        Schedule(**{**good, key: value})


# --- what no law can use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"eta": 0.0}, "adds no noise.*rollout.law=ode"), ({"law": "cps", "eta": 1.2}, "cps takes the angle.*0 to 1")],
)
def test_noise_levels_a_law_cannot_use_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        one_expert(config(**changes))
    one_expert(config(**{**changes, "law": "ode"}))


# --- the table for people -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["flow-sde", "dance-sde", "wan-sde", "cps", "dpm-sde", "dpm-sde-2m"])
def test_describe_says_what_every_step_does(law):
    chosen = config(law=law, first_step=0, high_steps=3, low_steps=2)
    plan = two_experts(chosen)
    window = (0, 1, 3, 6, 7)
    rows = describe(plan, window)
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["step"] for row in rows if row["trained"]] == list(window)
    for step, row in enumerate(rows):
        assert (row["sigma"], row["timestep"], row["guidance"]) == (
            plan.sigmas[step],
            plan.timesteps[step],
            plan.guidance[step],
        )
        assert row["law"] == (law if step in window else "euler")
        assert row["expert"] == ("high_noise", "low_noise")[plan.experts[step]]
        assert (row["std"] > 0) == (row["gradient_share"] > 0) == (step in window)
        assert row["noise_share"] == pytest.approx(row["std"] / plan.sigmas[step + 1] if step in window else 0)
    for name in ("high_noise", "low_noise"):
        assert sum(row["gradient_share"] for row in rows if row["expert"] == name) == pytest.approx(1)
    scales = [
        tr.gradient_scale(law, plan.form, plan.sigmas[i], plan.sigmas[i + 1], plan.eta, plan.sigmas[1]) for i in (6, 7)
    ]
    if law != "dpm-sde-2m":
        assert rows[6]["gradient_share"] / rows[7]["gradient_share"] == pytest.approx(scales[0] / scales[1])
    json.dumps(rows)


def test_describe_without_a_window_is_all_solver():
    rows = describe(two_experts(config(law="ode", solver="dpm-2m")), ())
    assert {row["law"] for row in rows} == {"dpm-2m"}
    assert not any(row["trained"] for row in rows)
