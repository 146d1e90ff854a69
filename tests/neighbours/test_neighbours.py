"""Other people's packages, as they are installed by ``make neighbours``, which runs their pages in ``docs`` as well."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from sklearn.datasets import load_digits

import f2d2_lightning as f2
import foreign_networks
from f2d2_lightning.adapters import FlowMatching, TorchCFM
from f2d2_lightning.checkpoints.pretrained import SHIPPED

diffusers = pytest.importorskip("diffusers")
flow_matching = pytest.importorskip("flow_matching.solver")
hub = pytest.importorskip("huggingface_hub.constants")
torchcfm = pytest.importorskip("torchcfm.models")
pytest.importorskip("timm")
pytest.importorskip("rectified_flow_pytorch")

PACKAGES = ("torchcfm", "flow_matching", "diffusers", "timm", "torch", "rectified-flow-pytorch")
CASES = [case for case in foreign_networks.cases() if case.source in PACKAGES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.source}: {case.name}")
def test_map_divergence_and_likelihood_are_those_of_the_network_itself(case):
    """Against calls without this package, reverse-mode autograd, and scipy's integrator with the exact trace."""
    digits = load_digits()
    images = torch.tensor(digits.images[:3]).unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)) / 8 - 1
    found = foreign_networks.compared(case, images.reshape(3, *case.shape), torch.tensor(digits.target[:3]))
    assert found["map"] < 1e-14
    assert found["divergence"] < 1e-13
    assert found["log_prob_difference"] < 1000 * case.tolerance, found


def test_the_perceptron_of_torchcfm():
    network, x = torchcfm.MLP(dim=2, time_varying=True), torch.randn(5, 2)
    flow_map = TorchCFM("net(cat(x, s))")(network)
    time = torch.linspace(0, 1, 5)
    assert torch.equal(flow_map.velocity(x, time), network(torch.cat((x, time[:, None]), 1)))
    f2.adapters.check_convention(flow_map, torch.randn(64, 2))


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_likelihood_of_flow_matching_is_the_reference(method):
    """By the same solver in as many steps (whose ends it adds up in floating point)."""

    class Velocity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))

        def forward(self, x, t):
            return self.layers(torch.cat((x, t.reshape(-1, 1).expand(len(x), 1)), 1))

    network, x = Velocity(), torch.randn(6, 3)
    velocity = FlowMatching("net(x, s)")(network)
    standard = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    noise, theirs = flow_matching.ODESolver(network).compute_likelihood(
        x, standard.log_prob, step_size=0.1, method=method, exact_divergence=True
    )
    ours = f2.reference_log_prob(velocity, x, method=method, steps=10)
    torch.testing.assert_close(ours.value, theirs, rtol=0, atol=1e-8)
    torch.testing.assert_close(ours.noise, noise, rtol=0, atol=1e-8)


def small_unet():
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def test_the_scheduler_of_diffusers_takes_steps_of_the_adapted_velocity():
    """With a shift of its times, too."""
    network = small_unet()
    flow = f2.adapters.Adapter(
        "net(x, 1000 * s)", noise_time=1.0, data_time=0.0, directions="none", output="sample"
    )(network)  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    sample = ours = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for time in scheduler.timesteps:
            sample = scheduler.step(network(sample, time.expand(3)).sample, time, sample).prev_sample
        times = 1 - scheduler.sigmas.double()
        for s, t in itertools.pairwise(times):
            ours = ours + (t - s) * flow.velocity(ours, s.expand(3))
    torch.testing.assert_close(ours, sample.double(), rtol=0, atol=1e-5)  # the scheduler's times are single precision


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("schedule", "zero_snr"),
    [("linear", False), ("scaled_linear", False), ("squaredcos_cap_v2", False), ("scaled_linear", True)],
)
def test_steps_of_ddim_are_steps_of_the_adapted_velocity(schedule, zero_snr, prediction):
    """Both read the same configuration."""
    betas = {"beta_schedule": schedule, "beta_start": 0.001, "beta_end": 0.015, "prediction_type": prediction}
    betas["rescale_betas_zero_snr"] = zero_snr
    scheduler = diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(6)
    network = small_unet()
    flow = f2.adapters.VariancePreserving("net(x, s)", **betas, output="sample")(network)
    signal = scheduler.alphas_cumprod.double().sqrt()
    noise = (1 - signal.square()).sqrt()
    whole = signal + noise  # a state of ours, and its time, are the scheduler's divided by it
    sample = torch.randn(3, 1, 8, 8)
    at = scheduler.timesteps.tolist()
    ours = sample / whole[at[0]]
    with torch.no_grad():
        for start, end in itertools.pairwise(at):
            sample = scheduler.step(network(sample, torch.full((3,), start)).sample, start, sample).prev_sample
            s, t = (signal / whole)[[start, end]]
            ours = ours + (t - s) * flow.velocity(ours, s.expand(3))
    torch.testing.assert_close(ours, sample / whole[at[-1]], rtol=0, atol=5e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_clean_image_of_a_latent_consistency_model_is_where_the_map_leads(prediction):
    scheduler = diffusers.LCMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(4)
    network = small_unet()
    flow = f2.adapters.LatentConsistency("net(x, s)", prediction_type=prediction, output="sample")(network)
    signal = scheduler.alphas_cumprod.double().sqrt()
    whole = signal + (1 - signal.square()).sqrt()
    sample = torch.randn(3, 1, 8, 8)
    for time in scheduler.timesteps.tolist()[1:]:  # the first is the network's last, where ours begins at noise alone
        with torch.no_grad():
            answer = network(sample, torch.full((3,), time)).sample
            clean = scheduler.step(answer, time, sample, generator=torch.Generator()).denoised
            ours = flow.jump(sample / whole[time], float(signal[time] / whole[time]), 1.0)
        torch.testing.assert_close(ours, clean.double(), rtol=0, atol=1e-4)


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    """As ``snapshot_download`` lays it out, without a network: what was downloaded once is opened by its name."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    model = tmp_path / "models--somebody--digits"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("0123abc")
    (model / "snapshots").mkdir()
    (model / "snapshots/0123abc").symlink_to(SHIPPED / "digits")
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        monkeypatch.setattr(sys.modules[name], "HF_HUB_CACHE", str(tmp_path), raising=False)
    assert f2.load("somebody/digits").shape == (1, 8, 8)
    with pytest.raises(FileNotFoundError, match="none can be downloaded from the hub"):
        f2.load("somebody/else")
