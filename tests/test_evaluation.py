"""Likelihoods gathered over a data set, failures and comparison included."""

import math

import pytest
import torch

from f2d2_lightning.evaluation import LikelihoodEvaluation


@pytest.mark.parametrize("levels", [None, 17])
def test_results_are_those_of_numpy_like_sums(levels):
    values = {1: torch.randn(30) - 5, 4: torch.randn(30) - 7}
    values[4][[2, 11]] = torch.nan
    reference = torch.randn(30) - 6
    evaluation = LikelihoodEvaluation((1, 4), 8, levels, -1.0, 1.0, torch.device("cpu"))
    for start in (0, 10, 20):
        batch = {k: v[start : start + 10] for k, v in values.items()}
        left = min(10, max(0, 14 - start))
        evaluation.update(batch, reference[start : start + left] if left else None)
    assert evaluation.compared == 14
    result = evaluation.results()
    unit, offset = (1.0, 0.0) if levels is None else (8 * math.log(2), -math.log2(2 / 17))
    for k, value in values.items():
        good = value.isfinite()
        nll = -value[good] / unit + offset
        both = good[:14]
        gap = (reference[:14] - value[:14])[both] / unit
        expected = {
            f"nll_{k}": nll.mean(),
            f"nll_standard_error_{k}": nll.std() / len(nll) ** 0.5,
            f"gap_{k}": gap.mean(),
            f"absolute_error_{k}": gap.abs().mean(),
            f"reference_nll_{k}": (-reference[:14][both] / unit + offset).mean(),
            f"correlation_{k}": torch.corrcoef(torch.stack((value[:14][both], reference[:14][both])))[0, 1],
            f"unconverged_{k}": torch.tensor(0.0 if k == 1 else 2 / 30),
        }
        for name, number in expected.items():
            torch.testing.assert_close(result[name], number.float(), msg=name, rtol=1e-5, atol=1e-6)


def test_what_no_sample_has_is_left_out():
    evaluation = LikelihoodEvaluation((2,), 8, None, -1.0, 1.0, torch.device("cpu"))
    evaluation.update({2: torch.full((5,), torch.nan)}, torch.zeros(3))
    assert evaluation.results() == {"unconverged_2": torch.tensor(1.0)}
    alone = LikelihoodEvaluation((2,), 8, None, -1.0, 1.0, torch.device("cpu"))
    alone.update({2: torch.zeros(5)}, None)
    assert set(alone.results()) == {"nll_2", "nll_standard_error_2", "unconverged_2"}
