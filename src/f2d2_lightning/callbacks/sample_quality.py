"""How good samples are while a model trains: FID, and on request KID, precision and recall, at several step counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from f2d2_lightning.callbacks._models import find_sampler
from f2d2_lightning.callbacks._names import network_name
from f2d2_lightning.callbacks._real_images import STAGES, RealImages, find_loader
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.quantization import state_images
from f2d2_lightning.metrics._cache import Statistics, StatisticsCache
from f2d2_lightning.metrics.image import ImageDistance
from f2d2_lightning.metrics.networks import check_network, extract_features, load_network
from f2d2_lightning.utils.checks import at_least, checked
from f2d2_lightning.utils.conditions import Cond, some_of
from f2d2_lightning.utils.fingerprints import fingerprint
from f2d2_lightning.utils.processes import gather_states
from f2d2_lightning.utils.seeding import mix_seed


class SampleQuality(L.Callback):
    """Draws samples in validation and test, and compares them with real images by the features of a network.

    Logs ``val/fid_4`` and so on, by number of steps: the Frechet distance of features to those of the real images
    (Heusel et al., 2017, https://arxiv.org/abs/1706.08500), with ``kid=True`` also ``kid_4`` and ``kid_std_4`` (its
    standard deviation over subsets), with ``precision_recall=True`` also ``precision_4`` and ``recall_4``. Images are
    8 bits a value before any feature is taken (:func:`f2d2_lightning.likelihood.state_images`).

    The model is an ``F2D2Module`` (its weight average), a ``FlowMatchingModule`` (its flow integrated in so many
    steps), or any module with an ``F2D2Callback`` in the same Trainer. Sample ``i`` is made from the same noise at
    every step count, in every epoch and whatever the number of processes. A conditional model gets the conditioning of
    the real images in turn. Random states are left as they were: training is the same, bit for bit, as without it.

    Statistics of the real images are computed when the run starts, and kept on disk by the content of the images and
    of the feature network. Nothing of all this enters a checkpoint.

    Args:
        features: Feature network: ``"inception"`` with ``weights``, the path of a file of
            :meth:`f2d2_lightning.metrics.SmallFeatures.save`, or a module from images
            ``uint8 (B, C, H, W)`` to features ``(B, F)``.
        weights: Local file of Inception's weights; nothing is downloaded.
        steps: Step counts, each with a figure of its own.
        samples: Samples per step count, over all processes. The FID depends on their number (it is biased upwards by
            about ``1 / samples``), so compare figures of equal numbers only.
        every_n_epochs: Evaluate in every n-th epoch of ``fit``; where there is no validation, at that epoch's end.
        kid: Also the kernel distance, over 100 subsets of 1,000.
        precision_recall: Also precision and recall by nearest neighbours, of as many real images as samples.
        data: Real images: ``"train"``, ``"val"`` or ``"test"``.
        real_samples: Real images to use, at random; ``None`` for all.
        batch_size: Samples and images at a time, per process.
        flow_map: Which ``F2D2Callback``, by the name of its network, where there are several.
        method: Solver of a teacher's flow: ``euler`` evaluates the network once a step, as few-step maps do.
        seed: Of the noise.
        cache: Folder for statistics of real images; by default in the user's cache
            (:class:`f2d2_lightning.metrics._cache.StatisticsCache`).

    Raises:
        ValueError: If numbers are out of range; at the start of a run, before its first step, if the data are no
            images, the network's answers are unfit, or nothing here draws samples; later, if samples are not finite.
        FileNotFoundError: At the start of a run, if the feature network's file is missing.
    """

    @checked
    def __init__(
        self,
        features: str | Path | nn.Module,
        weights: str | None = None,
        steps: Sequence[int] = (1, 2, 4, 8),
        samples: int = 10_000,
        every_n_epochs: int = 1,
        kid: bool = False,
        precision_recall: bool = False,
        data: str = "train",
        real_samples: int | None = None,
        batch_size: int = 256,
        flow_map: str | None = None,
        method: str = "euler",
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        self._least = 4 if precision_recall else 2
        if samples < self._least or (real_samples is not None and real_samples < self._least):
            raise ValueError(
                f"samples={samples} and real_samples={real_samples} are at least {self._least}: a covariance needs 2, "
                "and precision and recall the third neighbour of a sample; thousands make figures that mean something"
            )
        self.steps = tuple(steps)
        at_least(1, steps=min(steps, default=0), every_n_epochs=every_n_epochs, batch_size=batch_size)
        if data not in STAGES:
            raise ValueError(f"data is {data!r}; it is one of {', '.join(STAGES)}")
        self.features, self.weights = features, weights
        self.samples, self.every_n_epochs, self.batch_size = samples, every_n_epochs, batch_size
        self.kid, self.precision_recall = kid, precision_recall
        self.data, self.real_samples = data, real_samples
        self.flow_map, self.method, self.seed = flow_map, method, seed
        self.cache = StatisticsCache(cache)
        self.real: Statistics | None = None
        """Sums of the real images' features, as :attr:`ImageDistance.real` has them, once a run has started."""
        self.results: dict[int, dict[str, float]] = {}
        """Figures of the last evaluation by step count: ``fid``, ``kid`` and so on."""
        self._network: nn.Module | None = None
        self._key = ""
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._cond: Cond | None = None
        self._warned = False

    # --- the start of a run ---

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the feature network, and refuse what cannot work."""
        if stage == "predict":
            return
        kind = [c for c in trainer.callbacks if isinstance(c, SampleQuality)]  # type: ignore[attr-defined]
        others = [c for c in kind if c is not self and c.flow_map == self.flow_map]
        if common := sorted({k for other in others for k in other.steps if k in self.steps}):
            raise ValueError(
                f"two SampleQuality callbacks would log steps={common} under the same names; give each its own"
            )
        model = self.model(trainer, pl_module)
        if model.known_shape is not None and len(model.known_shape) != 3:
            raise ValueError(
                f"{model.title} is for states of shape {model.known_shape}; sample quality is of images (C, H, W): "
                "remove the callback, and compare likelihoods"
            )
        if self._network is None:
            self._network = load_network(self.features, self.weights)

    def model(self, trainer: L.Trainer, pl_module: L.LightningModule) -> LikelihoodModel:
        """What samples are drawn from; override it for a sampler of another kind."""
        return find_sampler(trainer, pl_module, self.flow_map, self.method)

    @property
    def network(self) -> nn.Module:
        """The feature network; ``RuntimeError`` before a run has started."""
        if self._network is None:
            raise RuntimeError("the feature network is loaded when a run starts (Trainer.fit, validate or test)")
        return self._network

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Statistics of the real images, before the first step."""
        device = pl_module.device
        with torch.inference_mode(False):
            self.network.to(device)
        with isolate_rng(include_cuda=device.type == "cuda"):
            model = self.model(trainer, pl_module)
            loader = find_loader(trainer, pl_module, self.data)
            real = RealImages(trainer, model, loader, self.real_samples, self.batch_size)
            x, cond = real.first()
            images = real.images(x)
            num_features = check_network(self.network, images)
            self._shape, self._dtype = tuple(x.shape[1:]), x.dtype
            start, end = self._share(trainer)
            self._cond = None if cond is None else real.conditions(start, max(end, start + 1))
            parts = gather_states(real.digests())
            if real.settle(parts):
                parts = gather_states(real.digests())
            digests = sorted(digest for part in parts for digest in part)
            kept = self.samples if self.kid or self.precision_recall else 0
            key = fingerprint("statistics 2", self.network, kept, digests)
            if self.real is None or key != self._key:
                self.real = self._statistics(trainer, real, key, extract_features(self.network, images))
                self._key = key
        count = int(self.real[2])
        if count < self._least:
            raise ValueError(f"there are {count} real images ({self.data} data); at least {self._least} are needed")
        if min(self.samples, count) <= num_features and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self.samples} samples and {count} real images for {num_features} features: a covariance "
                f"of so few has deficient rank, and the FID is biased upwards; take more than {num_features}, or a "
                "feature network with fewer features"
            )

    on_test_start = on_train_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_train_start(trainer, pl_module)

    def _statistics(self, trainer: L.Trainer, real: RealImages, key: str, probe: Tensor) -> Statistics:
        # machines may have caches of their own, so the first process decides for all
        found = self.cache.read(key, probe) if trainer.is_global_zero else None
        found = trainer.strategy.broadcast(found)
        if found is not None:
            return found
        metric = self._metric(probe)
        metric.update(probe[:0], real=True)
        kept = real.part(self.samples) if real.streams else self.samples
        for place, images in real:
            metric.update(extract_features(self.network, images, probe.shape[1]), True, max(0, kept - place))
        with metric.sync_context():
            statistics = metric.real
        if trainer.is_global_zero:
            self.cache.write(key, statistics, probe)
        return statistics

    def _metric(self, probe: Tensor) -> ImageDistance:
        # Apple's devices have no double precision
        device = "cpu" if probe.device.type == "mps" else probe.device
        return ImageDistance(probe.shape[1], self.kid, self.precision_recall).to(device)

    # --- evaluation ---

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and (trainer.state.fn == TrainerFn.VALIDATING or self._due(trainer)):
            self._evaluate(trainer, pl_module, "val")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.enable_validation and self._due(trainer):
            self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module, "test")

    def _due(self, trainer: L.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _share(self, trainer: L.Trainer) -> tuple[int, int]:
        """First sample of this process, and the one after its last."""
        share = math.ceil(self.samples / trainer.world_size)
        start = min(self.samples, trainer.global_rank * share)
        return start, min(self.samples, start + share)

    def noise(self, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Noise of samples by their numbers, ``(B, *shape)``, float32 on the CPU."""
        generators = (torch.Generator().manual_seed(mix_seed("sample quality", self.seed, i)) for i in indices)
        return torch.stack([torch.randn(*shape, generator=g, dtype=torch.float32) for g in generators])

    @torch.no_grad()
    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            torch.manual_seed(mix_seed("sample quality", self.seed))
            self.results = self._draw(trainer, pl_module)
        stage = f"{stage}/{network_name(trainer, SampleQuality, self.flow_map)}"
        for k, figures in self.results.items():
            pl_module.log_dict({f"{stage}{name}_{k}": torch.tensor(v).float() for name, v in figures.items()})

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[int, dict[str, float]]:
        """Figures of samples by step count, over all processes."""
        assert self.real is not None
        model, size, device = self.model(trainer, pl_module), len(self.real[0]), pl_module.device
        none = torch.zeros(0, size, device=device)
        metrics = {k: self._metric(none) for k in self.steps}
        for metric in metrics.values():
            # sums are over processes
            if trainer.is_global_zero:
                metric.real = self.real
            else:
                metric.update(none, real=True)
        lost = dict.fromkeys(self.steps, 0)
        begin, end = self._share(trainer)
        # processes may share a sharded network, and must call it equally often: those that have run out go on with one
        # sample that does not count
        for offset in range(0, math.ceil(self.samples / trainer.world_size), self.batch_size):
            indices = range(begin + offset, min(end, begin + offset + self.batch_size))
            noise = self.noise(indices or (0,), self._shape).to(device, self._dtype)
            cond = None
            if self._cond is not None:
                cond = some_of(self._cond, slice(offset, offset + len(indices)) if indices else slice(1))
            for k in self.steps:
                x = model.sample(noise, k, cond).state[: len(indices)]
                # counted out here, and refused by all processes together once they have met
                finite = x.flatten(1).isfinite().all(1)
                lost[k] += int((~finite).sum())
                features, x = none, x[finite]
                if len(x):
                    images = state_images(x, model.levels, model.low, model.high)
                    features = extract_features(self.network, images, size)
                metrics[k].update(features, real=False)
        everywhere = gather_states(lost)
        for k in self.steps:
            if missing := sum(each[k] for each in everywhere):
                raise ValueError(
                    f"{missing} of {self.samples} samples in {k} step{'s' if k > 1 else ''} hold NaN or infinity; the "
                    "model has diverged, or its first epochs are too early to sample (every_n_epochs=...)"
                )
        return {k: metric.compute() for k, metric in metrics.items()}
