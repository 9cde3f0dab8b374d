"""The transition laws: one formula, the published ones written out again, log-probs, gradients, solvers, noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import transitions as tr

EXACT_LAWS = ("flow-sde", "dance-sde", "wan-sde", "cps", "dpm-sde", "dpm-sde-2m")
PUBLISHED = (("flow-sde", 0.7), ("dance-sde", 0.3), ("wan-sde", 1.0))
STOCHASTIC = [
    *[(law, "euler-maruyama", eta) for law, eta in PUBLISHED],
    *[(law, "exact", 0.7) for law in EXACT_LAWS],
]


def shifted(steps: int, shift: float, last: float = 0.0) -> list[float]:
    """shift(linspace(1, last, steps + 1)), the grid of the published figures."""
    line = np.linspace(1.0, last, steps + 1)
    return (shift * line / (1 + (shift - 1) * line)).tolist()


SIGMAS = [float(np.float32(s)) for s in shifted(20, 5.0)]


def states(seed: int = 0, shape: tuple[int, ...] = (3, 4, 2, 5, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    return tr.noise(shape, seed=seed), 1.4 * tr.noise(shape, seed=seed + 1)


sigma_pairs = st.tuples(st.floats(1e-3, 0.999), st.floats(0.01, 0.99)).map(lambda p: (p[0], p[0] * p[1]))


# --- the one formula ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", EXACT_LAWS)
@given(pair=sigma_pairs, eta=st.floats(0.01, 1.0))
def test_exact_laws_never_add_more_noise_than_the_next_state_holds(law, pair, eta):
    sigma, sigma_next = pair
    c = tr.refresh(law, sigma, sigma_next, eta, 0.99)
    std = tr.kernel(law, "exact", sigma, sigma_next, eta, 0.99).std
    assert 0 <= c <= 1
    assert 0 <= std <= sigma_next
    assert std == pytest.approx(sigma_next * math.sqrt(1 - c * c), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("law", EXACT_LAWS)
@pytest.mark.parametrize("step", range(19))
def test_the_mean_is_the_one_formula(law, step):
    x, v = states()
    s, s_next = SIGMAS[step], SIGMAS[step + 1]
    c = tr.refresh(law, s, s_next, 0.6, SIGMAS[1])
    clean, noise = x.double() - s * v.double(), x.double() + (1 - s) * v.double()
    mean, _ = tr.transition(law, "exact", x, v, s, s_next, 0.6, sigma_1=SIGMAS[1])
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), (1 - s_next) * clean + s_next * c * noise, atol=3e-6, rtol=0)


@pytest.mark.parametrize("law", EXACT_LAWS)
@pytest.mark.parametrize("form", ["exact", "euler-maruyama"])
@given(pair=sigma_pairs)
@settings(max_examples=25)
def test_every_law_becomes_the_euler_step_as_its_noise_vanishes(law, form, pair):
    k = tr.kernel(law, form, *pair, 1e-9, 0.9995)
    assert k.on_x == pytest.approx(1.0, abs=1e-7)
    assert k.on_velocity == pytest.approx(pair[1] - pair[0], abs=1e-7)
    assert k.std < 1e-3


@pytest.mark.parametrize("law", EXACT_LAWS)
def test_without_noise_a_step_is_euler_bit_for_bit(law):
    x, v = states()
    mean, std = tr.transition(law, "exact", x, v, 0.8, 0.7, 0.0, sigma_1=0.99)
    assert std == 0.0
    assert torch.equal(mean, tr.euler(x, v, 0.8, 0.7))


@pytest.mark.parametrize(("law", "form", "eta"), STOCHASTIC)
def test_the_step_to_zero_is_deterministic_and_gives_the_clean_estimate(law, form, eta):
    x, v = states()
    mean, std = tr.transition(law, form, x, v, 0.2, 0.0, eta, sigma_1=0.99, previous=(x, 0.3))
    assert std == 0.0
    assert torch.equal(mean, tr.clean_estimate(x, v, 0.2))


@pytest.mark.parametrize("law", ["flow-sde", "dance-sde", "wan-sde"])
def test_exact_and_euler_maruyama_agree_on_short_steps(law):
    for sigma in (0.9, 0.5, 0.2):
        exact = tr.kernel(law, "exact", sigma, sigma - 1e-5, 0.7, 0.99)
        short = tr.kernel(law, "euler-maruyama", sigma, sigma - 1e-5, 0.7, 0.99)
        assert exact.std == pytest.approx(short.std, rel=1e-3)
        # The step itself has length 1e-5, so a drift that differed by 1 % would show here.
        assert exact.on_x == pytest.approx(short.on_x, abs=1e-8)
        assert exact.on_velocity == pytest.approx(short.on_velocity, abs=1e-8)


@given(pair=sigma_pairs, eta=st.floats(0.05, 1.4), start=st.sampled_from([1.0, 1 - 1e-6, 0.9998]))
def test_flow_sde_is_dpm_sde_with_half_its_eta_squared(pair, eta, start):
    for sigma, sigma_next in (pair, (start, 0.99)):
        flow = tr.kernel("flow-sde", "exact", sigma, sigma_next, eta, 0.99)
        dpm = tr.kernel("dpm-sde", "exact", sigma, sigma_next, eta**2 / 2, 0.99)
        assert flow == pytest.approx(dpm, abs=1e-12)


@pytest.mark.parametrize(("law", "form", "eta"), STOCHASTIC)
@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_the_first_step_does_not_depend_on_how_close_to_one_it_starts(law, form, eta, shift):
    sigma_1 = shifted(20, shift)[1]
    stds = [tr.kernel(law, form, first, sigma_1, eta, sigma_1).std for first in (1.0, 1 - 1e-6, 0.9998)]
    assert max(stds) <= 1.05 * min(stds)
    assert max(stds) <= 1.0


def test_the_guard_leaves_later_steps_alone_and_gives_the_published_first_std():
    assert tr.diffusion("flow-sde", 0.5, 0.7, 0.99) == 0.7
    assert tr.kernel("flow-sde", "euler-maruyama", 1.0, 0.98, 0.7, 0.98).std == pytest.approx(0.7)
    assert tr.refresh("flow-sde", 1.0, 0.98, 0.7, 0.98) == pytest.approx(math.exp(-0.245), rel=0.01)
    q = (1 - 0.8) * 0.7 / (0.8 * (1 - 0.7))
    assert tr.refresh("dpm-sde", 0.8, 0.7, 0.6, 0.98) == pytest.approx(q**0.6)


def test_laws_without_a_published_equation_are_exact_in_either_form():
    for law in ("cps", "dpm-sde", "dpm-sde-2m"):
        assert tr.resolve_form(law, "euler-maruyama") == "exact"
        assert tr.kernel(law, "euler-maruyama", 0.8, 0.7, 0.5, 0.98) == tr.kernel(law, "exact", 0.8, 0.7, 0.5, 0.98)
        with pytest.raises(ValueError, match="no Euler-Maruyama form"):
            tr.diffusion(law, 0.8, 0.5, 0.98)
    with pytest.raises(ValueError, match="unknown law"):
        tr.refresh("flow", 0.8, 0.7, 0.5, 0.98)


# --- the published formulas, written out again in float64 ---------------------------------------------------------


def flow_grpo(x, v, s, s_next, eta, sigma_1):
    """Flow-GRPO's SDE step: std_dev_t = sqrt(s / (1 - s)) eta, with sigma_1 in place of a sigma of exactly 1."""
    dt = s_next - s
    std_dev_t = math.sqrt(s / (1 - (sigma_1 if s == 1 else s))) * eta
    mean = x * (1 + std_dev_t**2 / (2 * s) * dt) + v * (1 + std_dev_t**2 * (1 - s) / (2 * s)) * dt
    return mean, std_dev_t * math.sqrt(-dt)


def dance_grpo(x, v, s, s_next, eta, sigma_1):
    """DanceGRPO's SDE step, with the score of the clean estimate."""
    dsigma = s_next - s
    original = x - s * v
    score = -(x - original * (1 - s)) / s**2
    return x + dsigma * v - 0.5 * eta**2 * score * dsigma, eta * math.sqrt(s - s_next)


def flow_grpo_wan(x, v, s, s_next, eta, sigma_1):
    """flow_grpo's Wan script: std_dev_t runs from sigma_min = 0 to sigma_max = sigmas[1]."""
    dt = s_next - s
    std_dev_t = 0.0 + (sigma_1 - 0.0) * s
    mean = x * (1 + std_dev_t**2 / (2 * s) * dt) + v * (1 + std_dev_t**2 * (1 - s) / (2 * s)) * dt
    return mean, std_dev_t * math.sqrt(-dt)


def flow_cps(x, v, s, s_next, eta, sigma_1):
    """Coefficients-preserving sampling."""
    std = s_next * math.sin(eta * math.pi / 2)
    return (x - s * v) * (1 - s_next) + (x + v * (1 - s)) * math.sqrt(s_next**2 - std**2), std


PEERS = [
    (flow_grpo, "flow-sde", 0.7),
    (flow_grpo, "flow-sde", 1.2),
    (dance_grpo, "dance-sde", 0.3),
    (flow_grpo_wan, "wan-sde", 1.0),
    (flow_cps, "cps", 0.8),
]


@pytest.mark.parametrize(("peer", "law", "eta"), PEERS)
@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_parity_with_the_published_formulas_at_every_step(peer, law, eta, shift):
    x, v = states()
    sigmas = [float(np.float32(s)) for s in shifted(20, shift)]
    for step in range(19):
        args = (sigmas[step], sigmas[step + 1], eta)
        mean, std = tr.transition(law, "euler-maruyama", x, v, *args, sigma_1=sigmas[1])
        want_mean, want_std = peer(x.double(), v.double(), *args, sigmas[1])
        torch.testing.assert_close(mean.double(), want_mean, atol=3e-6, rtol=0)
        assert std == pytest.approx(want_std, rel=1e-9)
        x_next = mean + std * tr.noise(x.shape, seed=step)
        log_prob = tr.log_prob(x_next, mean, std)
        want = -((x_next.double() - want_mean) ** 2) / (2 * want_std**2) - math.log(want_std)
        want = (want - math.log(math.sqrt(2 * math.pi))).mean(dim=tuple(range(1, x.ndim)))
        torch.testing.assert_close(log_prob.double(), want, atol=2e-4, rtol=0)
        if law == "cps":
            parity = tr.cps_unnormalised_log_prob(x_next, mean).double()
            torch.testing.assert_close(
                parity, -((x_next.double() - want_mean) ** 2).flatten(1).mean(1), atol=1e-5, rtol=0
            )


from_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FLOW_DPM = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
}


def velocity_at(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Some smooth velocity field; the solvers must agree on any."""
    return torch.sin(2 * x) + 0.5 * x * sigma - 0.3


@from_diffusers
@pytest.mark.parametrize(("law", "order"), [("dpm-sde", 1), ("dpm-sde-2m", 2)])
@pytest.mark.parametrize("steps", [8, 20])
def test_parity_with_diffusers_sde_dpmsolver(law, order, steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=order, solver_type="midpoint", **FLOW_DPM
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    theirs = ours = tr.noise((2, 500), seed=1)
    previous = None
    for step, t in enumerate(scheduler.timesteps):
        noise = tr.noise(theirs.shape, seed=step + 2)
        theirs = scheduler.step(velocity_at(theirs, sigmas[step]), t, theirs, variance_noise=noise).prev_sample
        velocity = velocity_at(ours, sigmas[step])
        pair = sigmas[step], sigmas[step + 1]
        # sigma_1 = sigma_0 turns the guard of the first step off, which diffusers does not have.
        mean, std = tr.transition(law, "exact", ours, velocity, *pair, 1.0, sigma_1=sigmas[0], previous=previous)
        previous = (tr.clean_estimate(ours, velocity, sigmas[step]), sigmas[step])
        ours = mean + std * noise
        assert (theirs - ours).abs().max() < 3e-5
    assert std == 0.0


@from_diffusers
@pytest.mark.parametrize("steps", [8, 20])
def test_parity_with_diffusers_dpmsolver_2m(steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", **FLOW_DPM
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    theirs = ours = tr.noise((2, 500), seed=1)
    previous, largest_correction = None, 0.0
    for step, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity_at(theirs, sigmas[step]), t, theirs).prev_sample
        velocity, pair = velocity_at(ours, sigmas[step]), (sigmas[step], sigmas[step + 1])
        after = tr.dpm_2m(ours, velocity, *pair, previous)
        largest_correction = max(largest_correction, (after - tr.euler(ours, velocity, *pair)).abs().max().item())
        previous = (tr.clean_estimate(ours, velocity, sigmas[step]), sigmas[step])
        ours = after
        assert (theirs - ours).abs().max() < 3e-5
    assert largest_correction > 0.01


def test_dpm_2m_is_the_stochastic_form_without_noise():
    x, v = states()
    previous = (tr.noise(x.shape, seed=9), 0.85)
    mean, std = tr.transition("dpm-sde-2m", "exact", x, v, 0.8, 0.7, 0.0, sigma_1=0.98, previous=previous)
    assert std == 0.0
    torch.testing.assert_close(mean, tr.dpm_2m(x, v, 0.8, 0.7, previous), atol=1e-6, rtol=0)


def test_history_from_pure_noise_counts_for_nothing():
    x, v = states()
    first = tr.transition("dpm-sde-2m", "exact", x, v, 0.98, 0.95, 1.0, sigma_1=0.98)[0]
    second = tr.transition("dpm-sde-2m", "exact", x, v, 0.98, 0.95, 1.0, sigma_1=0.98, previous=(10 * x, 1.0))[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_euler_equals_diffusers_bit_for_bit(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 21)[:-1].tolist())
    sigmas = scheduler.sigmas.tolist()
    theirs = ours = tr.noise((1, 16, 3, 12, 12), seed=1)
    for step, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity_at(theirs, sigmas[step]), t, theirs, return_dict=False)[0]
        velocity = velocity_at(ours, sigmas[step])
        ours, std = tr.transition("ode", "exact", ours, velocity, *sigmas[step : step + 2], 0.7, sigma_1=sigmas[1])
        assert std == 0.0
        assert torch.equal(ours, theirs)


# --- log-prob -----------------------------------------------------------------------------------------------------


@given(std=st.floats(1e-3, 2.0), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_log_prob_is_that_of_a_normal_distribution_exactly(std, seed):
    mean, noise = states(seed)
    x_next = mean + std * noise
    want = torch.distributions.Normal(mean, torch.tensor(std)).log_prob(x_next).flatten(1).mean(1)
    got = tr.log_prob(x_next, mean, std)
    assert got.shape == (3,)
    assert torch.equal(got, want)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("law", "form", "eta"), STOCHASTIC)
def test_replay_of_a_stored_state_gives_the_same_bits(law, form, eta, storage):
    x, v = states()
    x = x.to(storage).float()
    mean, std = tr.transition(law, form, x, v, 0.8, 0.7, eta, sigma_1=0.98)
    stored = (mean + std * tr.noise(x.shape, seed=5)).to(storage)
    old = tr.log_prob(stored.float(), mean, std)
    again, std_again = tr.transition(law, form, x.to(storage), v.clone().requires_grad_(), 0.8, 0.7, eta, sigma_1=0.98)
    new = tr.log_prob(stored, again, std_again)
    assert torch.equal(old, new.detach())


def test_half_precision_inputs_are_computed_in_fp32():
    x, v = (tensor.bfloat16() for tensor in states())
    for law, form, eta in STOCHASTIC:
        half, std = tr.transition(law, form, x, v, 0.8, 0.7, eta, sigma_1=0.98)
        full, _ = tr.transition(law, form, x.float(), v.float(), 0.8, 0.7, eta, sigma_1=0.98)
        assert torch.equal(half, full)
        assert tr.log_prob(x, half, std).dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_leaves_elements_out(kind):
    mean, noise = states()
    x_next = mean + 0.3 * noise
    mask = torch.ones(1, 1, 2, 1, 1, dtype=kind)
    mask[:, :, 0] = 0
    x_next[:, :, 0] = float("nan")
    got = tr.log_prob(x_next, mean, 0.3, mask)
    torch.testing.assert_close(got, tr.log_prob(x_next[:, :, 1:], mean[:, :, 1:], 0.3), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="leaves no latent element"):
        tr.log_prob(x_next, mean, 0.3, torch.zeros(1, 1, 2, 1, 1))


def test_a_deterministic_step_has_no_log_prob():
    x, v = states()
    for std in (0.0, float("nan")):
        with pytest.raises(ValueError, match="deterministic"):
            tr.log_prob(x, v, std)
    for law, form, eta in [*STOCHASTIC, ("ode", "exact", 0.7)]:
        last = (0.2, 0.1) if law == "ode" else (0.2, 0.0)
        assert tr.kernel(law, form, *last, eta, 0.98) == (1.0, last[1] - last[0], 0.0)
        with pytest.raises(ValueError, match="deterministic"):
            tr.gradient_scale(law, form, *last, eta, 0.98)


# --- gradients ----------------------------------------------------------------------------------------------------


GRADIENT_CASES = [
    *[(*kind, pair, None) for kind in STOCHASTIC for pair in ((1.0, 0.98), (0.8, 0.7), (0.1, 0.03))],
    *[("dpm-sde-2m", "exact", 0.7, pair, 0.995) for pair in ((0.98, 0.96), (0.8, 0.7), (0.1, 0.03))],
]


@pytest.mark.parametrize(("law", "form", "eta", "pair", "sigma_previous"), GRADIENT_CASES)
def test_gradient_scale_is_what_autograd_finds(law, form, eta, pair, sigma_previous):
    x, v = states()
    v.requires_grad_()
    before = tr.noise(x.shape, seed=8).requires_grad_()
    previous = None if sigma_previous is None else (before, sigma_previous)
    mean, std = tr.transition(law, form, x, v, *pair, eta, sigma_1=0.98, previous=previous)
    noise = tr.noise(x.shape, seed=4)
    tr.log_prob((mean + std * noise).detach(), mean, std).sum().backward()
    slope = torch.autograd.grad(tr.transition(law, form, x, v, *pair, eta, sigma_1=0.98, previous=previous)[0].sum(), v)
    scale = tr.gradient_scale(law, form, *pair, eta, 0.98, sigma_previous=sigma_previous)
    assert before.grad is None
    assert slope[0].abs().mean().item() / std == pytest.approx(scale, rel=1e-4)
    elements = x[0].numel()
    torch.testing.assert_close(v.grad * elements, slope[0].sign() * scale * noise, atol=2e-3 * scale, rtol=2e-3)


GRADIENT_STEPS = (0, 1, 2, 4, 8, 12, 16, 18)


@pytest.mark.parametrize(
    ("law", "eta", "shift", "want"),
    [
        ("flow-sde", 0.7, 5, (0.015, 0.019, 0.029, 0.049, 0.098, 0.195, 0.469, 0.920)),
        ("dance-sde", 0.3, 5, (0.340, 0.355, 0.371, 0.408, 0.508, 0.676, 1.017, 1.390)),
        ("cps", 0.8, 5, (0.011, 0.020, 0.029, 0.051, 0.114, 0.225, 0.518, 1.218)),
        ("flow-sde", 0.7, 12, (0.006, 0.008, 0.012, 0.021, 0.044, 0.095, 0.273, 0.661)),
    ],
)
def test_gradient_scale_of_the_published_recipes(law, eta, shift, want):
    sigmas = shifted(20, shift)
    got = [tr.gradient_scale(law, "euler-maruyama", sigmas[i], sigmas[i + 1], eta, sigmas[1]) for i in GRADIENT_STEPS]
    assert got == pytest.approx(want, abs=6e-4)


# --- noise --------------------------------------------------------------------------------------------------------


SEED_GOLDEN = 6344448722925556140
NOISE_GOLDEN = [1.8400526, -1.0379294, 0.3216514]


def test_noise_seeds_are_a_fixed_function_of_their_address():
    assert tr.noise_seed(0, 0, 0, 0, -1) == SEED_GOLDEN
    addresses = list(itertools.product((0, 1), (-1, 0, 1, 11), (0, 1, 11), range(3), (-1, 0, 1)))
    seeds = {tr.noise_seed(*address) for address in addresses}
    assert len(seeds) == len(addresses)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_is_standard_normal_repeatable_and_uses_the_whole_seed():
    first = tr.noise((4, 50_000), seed=3)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    assert torch.equal(first, tr.noise((4, 50_000), seed=3))
    assert not torch.equal(first[0], tr.noise((50_000,), seed=3 + 2**32))
    assert abs(first.mean().item()) < 0.01
    assert first.std().item() == pytest.approx(1, abs=0.01)
    assert first.flatten()[:3].tolist() == pytest.approx(NOISE_GOLDEN, abs=1e-6)
