"""The window of a group: its range, its quota of each expert, its three policies, and every refusal with its hint."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rollout import transitions as tr
from rollout.window import choose_window, trained_steps, window_range
from shards.errors import UserError
from tests.rollout.test_schedule import config, one_expert, two_experts

GROUPS = st.fixed_dictionaries({"iteration": st.integers(0, 10_000), "prompt_id": st.integers(0, 10_000)})
POLICIES = st.sampled_from(["random", "fixed", "progressive"])


@given(
    policy=POLICIES,
    group=GROUPS,
    steps=st.integers(8, 40),
    first_step=st.integers(0, 2),
    high_steps=st.integers(1, 2),
    low_steps=st.integers(1, 2),
    two=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_window_meets_its_quota_and_never_takes_the_last_step(
    policy, group, steps, first_step, high_steps, low_steps, two
):
    chosen = config(
        window=policy, steps=steps, shift=8.0, first_step=first_step, high_steps=high_steps, low_steps=low_steps
    )
    plan = two_experts(chosen) if two else one_expert(chosen)
    window = choose_window(plan, chosen, **group)
    assert list(window) == sorted(set(window))
    assert first_step <= window[0]
    assert window[-1] < steps - 1
    counts = [plan.experts[step] for step in window]
    assert (counts.count(0), counts.count(1)) == (high_steps, low_steps if two else 0)
    assert window == choose_window(plan, chosen, **group)
    for step in window:
        std = tr.kernel(plan.law, plan.form, plan.sigmas[step], plan.sigmas[step + 1], plan.eta, plan.sigmas[1]).std
        assert std > 0


def test_random_windows_reach_every_step_and_depend_on_seed_iteration_and_prompt():
    chosen = config(steps=12)
    plan = two_experts(chosen)
    windows = {(it, p): choose_window(plan, chosen, iteration=it, prompt_id=p) for it in range(20) for p in range(20)}
    assert {step for window in windows.values() for step in window} == set(range(1, 11))
    assert len({windows[it, 0] for it in range(20)}) > 5
    assert len({windows[0, p] for p in range(20)}) > 5
    others = [choose_window(plan, config(steps=12, seed=1), iteration=it, prompt_id=0) for it in range(20)]
    assert others != [windows[it, 0] for it in range(20)]
    frequency = [sum(step in window for window in windows.values()) for step in range(1, 11)]
    high = plan.experts[1:11].count(0)
    assert min(frequency[:high]) > 0.7 * 400 * 2 / high
    assert max(frequency[:high]) < 1.3 * 400 * 2 / high


def test_random_windows_are_frozen():
    """Another release must choose the same steps, or a resumed run would mix two windows."""
    chosen = config(steps=12)
    plan = two_experts(chosen)
    assert [choose_window(plan, chosen, iteration=it, prompt_id=17) for it in range(3)] == [
        (1, 2, 10),
        (1, 4, 8),
        (1, 5, 10),
    ]


def test_fixed_windows_take_the_first_steps():
    chosen = config(window="fixed", first_step=2)
    plan = two_experts(chosen)
    assert plan.experts.count(0) == 5
    assert choose_window(plan, chosen, iteration=7, prompt_id=9) == (2, 3, 5)


def test_progressive_windows_slide_and_start_over():
    chosen = config(window="progressive", high_steps=3)
    plan = one_expert(chosen)
    windows = [choose_window(plan, chosen, iteration=it, prompt_id=it % 3) for it in range(8)]
    assert windows[:6] == [(start, start + 1, start + 2) for start in range(1, 7)]
    assert windows[6:] == windows[:2]


def test_one_expert_ignores_the_low_noise_quota():
    chosen = config(high_steps=2, low_steps=50, guidance_scale_2=None)
    assert len(choose_window(one_expert(chosen), chosen, iteration=0, prompt_id=0)) == 2


@pytest.mark.parametrize(("quota", "expert"), [({"high_steps": 0}, 1), ({"low_steps": 0}, 0)])
def test_training_one_of_two_experts_must_be_asked_for(quota, expert):
    plan = two_experts(config())
    with pytest.raises(UserError, match=r"never trains the .*_noise expert.*allow_untrained_expert"):
        choose_window(plan, config(**quota), iteration=0, prompt_id=0)
    allowed = config(allow_untrained_expert=True, **quota)
    window = choose_window(plan, allowed, iteration=0, prompt_id=0)
    assert {plan.experts[step] for step in window} == {expert}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"high_steps": 5},
            r"high_steps=5, but only 4 steps of the high_noise expert.*hint: set rollout.high_steps to 4",
        ),
        ({"low_steps": 5}, r"low_steps=5, but only 4 steps of the low_noise expert"),
        ({"first_step": 5}, r"high_steps=2, but only 0 steps of the high_noise.*hint: lower rollout.first_step"),
        ({"first_step": 9}, r"first_step=9 leaves no step to train.*hint: take rollout.first_step <= 8"),
        ({"first_step": 99}, r"first_step=99 leaves no step"),
        ({"steps": 2, "first_step": 1, "allow_untrained_expert": True}, r"first_step=1 leaves no step"),
        ({"high_steps": 0, "low_steps": 0, "allow_untrained_expert": True}, r"no step of the rollout is trained"),
    ],
)
def test_impossible_windows_are_refused_with_a_hint(changes, message):
    chosen = config(**changes)
    with pytest.raises(UserError, match=message):
        choose_window(two_experts(chosen), chosen, iteration=0, prompt_id=0)


def test_an_expert_out_of_reach_is_passed_over_when_that_is_allowed():
    chosen = config(first_step=5, allow_untrained_expert=True)
    plan = two_experts(chosen)
    window = choose_window(plan, chosen, iteration=0, prompt_id=0)
    assert [plan.experts[step] for step in window] == [1]


def test_one_expert_with_a_quota_of_nothing_is_refused():
    for allow in (False, True):
        chosen = config(high_steps=0, allow_untrained_expert=allow)
        with pytest.raises(UserError, match=r"no step of the rollout is trained.*high_steps to 1"):
            choose_window(one_expert(chosen), chosen, iteration=0, prompt_id=0)


def test_a_schedule_that_never_reaches_an_expert_is_refused():
    with pytest.raises(UserError, match=r"none of the 2 steps runs the low_noise expert.*875.*more rollout.steps"):
        two_experts(config(steps=2, shift=12.0))
    with pytest.raises(UserError, match="none of the 10 steps runs the high_noise expert"):
        two_experts(config(), boundary=1.1)
    allowed = config(steps=3, shift=16.0, allow_untrained_expert=True, high_steps=1)
    plan = two_experts(allowed, boundary=0.5)
    assert plan.experts == (0, 0, 0)
    assert choose_window(plan, allowed, iteration=0, prompt_id=0) == (1,)


# --- the range ----------------------------------------------------------------------------------------------------


@given(
    policy=POLICIES,
    group=GROUPS,
    steps=st.integers(4, 40),
    first_step=st.integers(0, 12),
    length=st.integers(1, 12),
    quota=st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_no_window_leaves_its_range(policy, group, steps, first_step, length, quota):
    last_step = first_step + length - 1
    assume(last_step < steps - 1)
    assume(quota <= length)
    chosen = config(window=policy, steps=steps, first_step=first_step, last_step=last_step, high_steps=quota)
    window = choose_window(one_expert(chosen), chosen, **group)
    assert len(set(window)) == quota
    assert set(window) <= set(range(first_step, last_step + 1))


def test_three_of_the_first_ten_steps_reach_all_ten_and_no_other():
    chosen = config(steps=20, first_step=0, last_step=9, high_steps=3)
    plan = one_expert(chosen)
    windows = [choose_window(plan, chosen, iteration=it, prompt_id=0) for it in range(200)]
    assert {step for window in windows for step in window} == set(range(10))
    assert {len(window) for window in windows} == {3}


def test_half_of_the_steps_of_both_experts():
    chosen = config(high_steps=3, low_steps=2)
    plan = two_experts(chosen)
    windows = [choose_window(plan, chosen, iteration=it, prompt_id=0) for it in range(50)]
    assert {len(window) for window in windows} == {plan.steps // 2}
    assert {step for window in windows for step in window} == set(range(1, 9))


def test_without_a_last_step_the_range_ends_before_the_last_of_all():
    chosen = config(steps=12)
    assert window_range(one_expert(chosen), chosen) == range(1, 11)
    narrow = config(steps=12, last_step=10)
    assert window_range(one_expert(narrow), narrow) == range(1, 11)
    windows = [choose_window(one_expert(c), c, iteration=3, prompt_id=4) for c in (chosen, narrow)]
    assert windows[0] == windows[1]


def test_a_progressive_window_stays_for_its_iterations_and_turns_inside_its_range():
    chosen = config(window="progressive", high_steps=2, first_step=2, last_step=5, window_iterations=3)
    plan = one_expert(chosen)
    windows = [choose_window(plan, chosen, iteration=it, prompt_id=it) for it in range(12)]
    assert windows == [(2, 3)] * 3 + [(3, 4)] * 3 + [(4, 5)] * 3 + [(2, 3)] * 3


def test_high_or_low_only():
    for quota, expert in (({"low_steps": 0}, 0), ({"high_steps": 0}, 1)):
        chosen = config(allow_untrained_expert=True, first_step=2, last_step=7, **quota)
        plan = two_experts(chosen)
        windows = [choose_window(plan, chosen, iteration=it, prompt_id=0) for it in range(30)]
        steps = {step for window in windows for step in window}
        assert steps == {step for step in range(2, 8) if plan.experts[step] == expert}


@pytest.mark.parametrize(
    ("changes", "problem", "hint"),
    [
        (
            {"last_step": 9},
            "rollout.last_step=9, but of 10 steps (0 to 9) the last is never stochastic",
            "take rollout.last_step <= 8, or more rollout.steps",
        ),
        (
            {"first_step": 5, "last_step": 4},
            "rollout.last_step=4 comes before rollout.first_step=5: no step is left to train",
            "take rollout.last_step >= 5, or a lower rollout.first_step",
        ),
        (
            {"last_step": 4},
            "rollout.low_steps=1, but only 0 steps of the low_noise expert can be stochastic "
            "(from rollout.first_step=1 to rollout.last_step=4)",
            "widen rollout.first_step to rollout.last_step, take more rollout.steps or another rollout.shift",
        ),
        (
            {"last_step": 6, "low_steps": 3},
            "rollout.low_steps=3, but only 2 steps of the low_noise expert can be stochastic "
            "(from rollout.first_step=1 to rollout.last_step=6)",
            "set rollout.low_steps to 2 or less, widen rollout.first_step to rollout.last_step, or take more "
            "rollout.steps",
        ),
    ],
)
def test_a_range_that_cannot_be_is_told_word_by_word(changes, problem, hint):
    chosen = config(**changes)
    with pytest.raises(UserError) as caught:
        choose_window(two_experts(chosen), chosen, iteration=0, prompt_id=0)
    assert (caught.value.problem, caught.value.hint) == (problem, hint)


@pytest.mark.parametrize("law", ["flow-sde", "ode"])
@pytest.mark.parametrize("window", ["random", "progressive", "fixed"])
def test_the_steps_that_are_ever_trained_are_known_before(window, law):
    chosen = config(window=window, law=law, low_steps=0, allow_untrained_expert=True)
    plan = two_experts(chosen)
    taken = {
        step
        for iteration in range(40)
        for prompt in range(5)
        for step in choose_window(plan, chosen, iteration=iteration, prompt_id=prompt)
    }
    assert trained_steps(plan, chosen) == sorted(taken)


def test_groups_of_an_iteration_draw_their_own_windows_and_videos_share_them(tiny_t2v2, tmp_path):
    from rollout.plan import stage_plan
    from rollout.policy.folder import read_layout
    from tests.support.training import make_run

    run = make_run(tmp_path / "run", tiny_t2v2, prompts_per_iteration=3, steps=12, shift=5.0)
    layout = read_layout(tiny_t2v2)
    plans = [stage_plan(run, run.iteration(k), layout) for k in range(6)]
    assert any(len({group.window for group in plan.groups}) > 1 for plan in plans)
    assert all(len(group.window) == 3 for plan in plans for group in plan.groups)
