"""Data modules of images by ``class_path``, from the command line and from a checkpointed run's configuration."""

from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser

import f2d2_lightning as f2
from f2d2_lightning.cli import main
from made_data import make_edm

CLASSES = {
    "CIFAR10": {"folder": "here", "val": 7, "flip": True, "batch_size": 3},
    "CelebA64": {"folder": "here", "crop": 148, "resize": "lanczos", "attribute": "Young", "num_workers": 2},
    "ImageNet64": {"folder": "here", "version": "pictures", "val": 5, "eval_batch_size": 9},
    "EDMZip": {"path": "a.zip", "resolution": 8, "labels": True, "seed": 4},
    "ImageFolder": {"folder": "here", "size": 8, "crop": "square", "resize": "box", "flip": True},
    "FashionMNIST": {"folder": "here", "flip": True, "download": False},
}


@pytest.mark.parametrize("name", list(CLASSES))
def test_they_are_made_from_a_configuration(name):
    parser = ArgumentParser()
    parser.add_subclass_arguments(f2.data.FlowDataModule, "data")
    config = parser.parse_object({"data": {"class_path": f"f2d2_lightning.data.{name}", "init_args": CLASSES[name]}})
    data = parser.instantiate_classes(config).data
    assert type(data) is getattr(f2.data, name)
    assert data.levels == 256
    assert len(data.shape) == 3
    for argument in ("flip", "batch_size", "eval_batch_size", "num_workers", "seed"):
        if argument in CLASSES[name]:
            assert getattr(data, argument) == CLASSES[name][argument]


def test_training_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    make_edm(tmp_path / "a.zip")
    network = {"class_path": "f2d2_lightning.nn.MLP", "init_args": {"shape": [3, 8, 8], "width": 8, "blocks": 1}}
    (tmp_path / "run.yaml").write_text(
        f"""
        model:
          class_path: f2d2_lightning.FlowMatchingModule
          init_args: {{shape: [3, 8, 8], levels: 256, flow_map: {network}}}
        data:
          class_path: f2d2_lightning.data.EDMZip
          init_args: {{path: a.zip, resolution: 8, val: 5, batch_size: 8, flip: true, cache: arrays}}
        trainer: {{accelerator: cpu, max_epochs: 1, logger: false, enable_progress_bar: false,
                   enable_model_summary: false, enable_checkpointing: false}}
        """.replace("'", '"')
    )
    main(["fit", "--config", "run.yaml"])
    assert len(list((tmp_path / "arrays").iterdir())) == 1


def test_one_process_of_a_node_prepares(tmp_path, monkeypatch):
    """Files are written in ``prepare_data``, which Lightning calls in one process before it calls ``setup`` in all."""
    make_edm(tmp_path / "a.zip")
    data = f2.data.EDMZip(str(tmp_path / "a.zip"), 8, val=5, cache=str(tmp_path / "arrays"))
    assert not (tmp_path / "arrays").exists()
    data.prepare_data()
    assert len(list((tmp_path / "arrays").iterdir())) == 1
