"""Augmentations of training batches, on the device."""
