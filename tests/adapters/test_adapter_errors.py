"""What an adapter refuses, and that it says what to do."""

import pickle

import pytest
import torch
from torch import nn

import f2d2_lightning.adapters as adapters
from f2d2_lightning import as_flow_map
from f2d2_lightning.adapters import (
    CTM,
    Adapter,
    Consistency,
    ConventionError,
    Denoiser,
    Shortcut,
    VarianceExploding,
    VariancePreserving,
    adapter_from_config,
    check_convention,
)
from f2d2_lightning.adapters.call import Call

CALLS = [
    ("net(x, t=s, t=t)", "gives t= twice"),
    ("net(x, s", "cannot be read"),
    ("x + s", "is no call"),
    ("other(x, s)", "does not call net"),
    ("net.a.b(x)", "does not call net"),
    ("net(s, t)", "does not pass the state x"),
    ("net(x, **cond)", r"\*\* argument"),
    ("net(x, *cond)", "not understood"),
    ("net(x, y)", "'y'"),
    ("net(x, __import__('os').getcwd())", "not understood"),
    ("net(x, [s for s in t])", "not understood"),
    ("net(x, log(s, base=2))", "keyword"),
    ("net(x, clamp(s, 0.0))", "clamp takes 3"),
    ("net(cat(x))", "cat takes 2"),
]


@pytest.mark.parametrize(("text", "words"), CALLS)
def test_calls_that_are_not_understood(text, words):
    with pytest.raises(ValueError, match=words):
        Call(text)


def test_calls_are_arithmetic():
    names = {"x": "state", "s": torch.tensor([0.25]), "t": torch.tensor([0.75]), "cond": "label"}

    def net(*arguments, **keywords):
        return arguments, keywords

    call = Call("net(x, (-s, +t - s), [s / 2, 'text', None, True], a={'k': cond, 'm': 2 * t}, b=full(3.0, s))")
    arguments, keywords = call(net, names)
    assert arguments == ("state", (-0.25, 0.5), [0.125, "text", None, True])
    assert keywords == {"a": {"k": "label", "m": 1.5}, "b": 3.0}
    expected = {
        "abs(s - t)": 0.5,
        "clamp(s, 0.5, 1.0)": 0.5,
        "exp(s)": 1.2840254166877414,
        "log(t)": -0.2876820724517809,
        "log2(s)": -2.0,
        "round(t)": 1.0,
        "sqrt(s)": 0.5,
    }
    for text, value in expected.items():
        assert float(Call(f"net(x, {text})")(net, names)[0][1]) == pytest.approx(value, abs=1e-14)
    assert pickle.loads(pickle.dumps(call))(net, names) == (arguments, keywords)


ARGUMENTS = [
    (Adapter, {"noise_time": 1.0, "data_time": 1.0}, "both 1.0"),
    (Adapter, {"answer": "noise"}, "'velocity', 'state'"),
    (Adapter, {"directions": "up"}, "'to_data'"),
    (Adapter, {"time_axes": 0}, "at least 1"),
    (Adapter, {"prior_std": -1.0}, "positive"),
    (Adapter, {"shortest": 0.0}, r"in \(0, 1\)"),
    (Adapter, {"call": "net(x, s)", "answer": "state"}, "no end time t"),
    (Shortcut, {"second_time": "size"}, "'index'"),
    (VarianceExploding, {"precondition": "vp"}, "'edm'"),
    (VarianceExploding, {"answer": "velocity"}, "'clean', 'state'"),
    (VarianceExploding, {"sigma_min": 2.0, "sigma_max": 1.0}, "in this order"),
    (VarianceExploding, {"answer": "state"}, "no end time t"),
    (VariancePreserving, {"prediction_type": "velocity"}, "'v_prediction'"),
    (VariancePreserving, {"beta_schedule": "sigmoid"}, "'scaled_linear'"),
    (VariancePreserving, {"beta_start": 0.2, "beta_end": 0.1}, "in this order, and below 1"),
    (VariancePreserving, {"beta_end": 0.99}, "leave nothing of the data"),
    (VariancePreserving, {"beta_schedule": "continuous", "beta_end": 1e9}, "leave nothing of the data"),
    (VariancePreserving, {"beta_schedule": "continuous", "rescale_betas_zero_snr": True}, "has none"),
    (VariancePreserving, {"num_train_timesteps": 2, "rescale_betas_zero_snr": True}, "3 to 100000"),
    (VariancePreserving, {"num_train_timesteps": 10**12}, "2 to 100000"),
    (VariancePreserving, {"sigma_min": 0.1}, "VariancePreserving has no sigma_min"),
    (Denoiser, {"noise_time": 1.0}, "Denoiser has no noise_time"),
    (Consistency, {"prior_std": 0.5}, "take Adapter"),
]


@pytest.mark.parametrize(("cls", "arguments", "words"), ARGUMENTS)
def test_arguments(cls, arguments, words):
    with pytest.raises(ValueError, match=words):
        cls(**arguments)


def test_configurations_of_other_code():
    class Mine(Adapter):
        pass

    for config in (
        Mine().config(),
        {"class": "os.system", "call": "net(x)"},
        {"class": "FeatureTap"},
        {"class": "__doc__"},
        {"class": 3},
        {},
    ):
        with pytest.raises(ValueError, match="pass the object"):
            adapter_from_config(config)
    with pytest.raises(ValueError, match="does not take these arguments"):
        adapter_from_config({"class": "Adapter", "colour": "red"})
    assert set(adapters.__all__) >= {"adapter_from_config", "check_convention", "ConventionError"}


class Labelled(nn.Module):
    def forward(self, x, s, t, y):
        return x + y.sum()


def test_labels():
    x = torch.randn(4, 3)
    one_hot = Adapter(classes=3)(Labelled())
    for cond in (torch.rand(4, 3), torch.zeros(4, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"classes=3 it is integer labels \(B,\)"):
            one_hot(x, 0.1, 0.2, cond)
    assert torch.equal(one_hot(x, 0.1, 0.2, torch.tensor([0, 1, 2, 0])), x + 4)
    assert torch.equal(Adapter(null_label=9)(Labelled())(x, 0.1, 0.2), x + 36)


@pytest.mark.parametrize("cond", [{"y": "text"}, (torch.zeros(8), 3.0), ["a", "b", "c", "d"], 3])
def test_conditioning_is_of_tensors(cond):
    network = nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(8, 3)
    for adapter in (Adapter(), Adapter("net(x)", directions="none"), Adapter(output=0), Adapter(classes=3)):
        flow_map = adapter(network)
        for function in (flow_map, flow_map.forward_features):
            with pytest.raises(ValueError, match=r"cond (is|holds) a (str|int|float), .* a tensor \(B, \.\.\.\)"):
                function(x, 0.2, 0.2, cond)
        with pytest.raises(ValueError, match=r"a tensor \(B, \.\.\.\)"):
            check_convention(flow_map, x, cond)


def test_answers():
    x = torch.randn(4, 3)

    class Named:
        sample = x

    named = Adapter(output="sample")
    assert torch.equal(named(lambda x, s, t, cond: Named())(x, 0.1, 0.2), x)
    assert torch.equal(named(lambda x, s, t, cond: {"sample": x})(x, 0.1, 0.2), x)
    for adapter, answer, words in (
        (named, {"other": x}, r"a mapping with 'other', which has no part output='sample'"),
        (named, (x, x), "a tuple of 2"),
        (Adapter(), (x, x), r"a tuple of 2 \(Tensor, Tensor\), not a tensor.*output=0"),
        (Adapter(), {"u": x}, "output='name'"),
        (Adapter(output=2), (x, x), "no part output=2"),
        (Adapter(), x[:, :2], r"shape \(4, 3\) and answered shape \(4, 2\).*output= and channels_last="),
        (Adapter(), x[:2], r"answered shape \(2, 3\)"),
    ):
        with pytest.raises(ConventionError, match=words):
            adapter(lambda x, s, t, cond, answer=answer: answer)(x, 0.1, 0.2)
    with pytest.raises(ConventionError, match=r"shape \(4, 2, 2, 3\) and answered shape \(4, 3, 2, 2\)"):
        Adapter(channels_last=True)(lambda x, s, t, cond: x.movedim(-1, 1))(torch.randn(4, 3, 2, 2), 0.1, 0.2)


def test_directions_are_those_declared():
    x = torch.randn(4, 3)
    flow_map = CTM("net(x, s, t)")(lambda x, s, t: x)
    with pytest.raises(ValueError, match="only goes to data"):
        flow_map(x, 0.5, 0.2)
    with pytest.raises(ValueError, match="only goes to noise"):
        CTM("net(x, s, t)")(lambda x, s, t: x, directions="to_noise")(x, 0.2, 0.5)


def test_what_the_check_takes():
    with pytest.raises(ValueError, match=r"adapter\(network\).*FlowMapContract"):
        check_convention(as_flow_map(lambda x, s, t, cond: x), torch.randn(8, 3))
    flow_map = Adapter()(lambda x, s, t, cond: -x * t[:, None])
    with pytest.raises(ValueError, match="NaN or infinity"):
        check_convention(flow_map, torch.full((8, 3), torch.nan))
    with pytest.raises(ValueError, match="floating"):
        check_convention(flow_map, torch.ones(8, 3, dtype=torch.long))
    check_convention(flow_map, torch.randn(1, 3))  # too few to judge signs


def test_a_preconditioning_that_cannot_leave_the_data():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="precondition='edm'"):
        Consistency("net(x, 250 * log(s))", precondition="consistency")(network, interval="0")
