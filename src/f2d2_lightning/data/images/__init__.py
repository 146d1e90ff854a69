"""Data modules of images; all are at :mod:`f2d2_lightning.data`."""
