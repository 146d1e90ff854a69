"""Which samples of an evaluation count, on several processes."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from f2d2_lightning.utils.processes import Places


class Own(BatchSampler):
    """Somebody's own, into which Lightning puts its distributed sampler."""


@pytest.mark.parametrize("own", [False, True])
def test_samples_that_are_repeated_to_fill_up_do_not_count(own):
    data, seen = TensorDataset(torch.arange(7)), []
    for rank in range(2):
        dealt = DistributedSampler(data, 2, rank, shuffle=False)
        options = {"batch_sampler": Own(dealt, 3, False)} if own else {"batch_size": 3, "sampler": dealt}
        loader = DataLoader(data, **options)
        places = Places(SimpleNamespace(testing=False, val_dataloaders=loader))
        for (rows,) in loader:
            place, counted = places.take(len(rows))
            assert torch.equal(place[counted], rows[counted])
            seen += rows[counted].tolist()
    assert sorted(seen) == list(range(7))
