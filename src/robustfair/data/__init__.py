"""Data sets, splits, augmentation and batches."""

from robustfair.data.augment.crops import AUGMENTATIONS, Augmentation, CropFlip, Identity, parse_augmentation
from robustfair.data.catalog import CATALOG, CatalogEntry
from robustfair.data.datasets import ImageDataset, Splits, load_dataset
from robustfair.data.loader import Loader, evaluation_batches
from robustfair.data.split import split_hash, stratified_split

__all__ = [
    "AUGMENTATIONS",
    "CATALOG",
    "Augmentation",
    "CatalogEntry",
    "CropFlip",
    "Identity",
    "ImageDataset",
    "Loader",
    "Splits",
    "evaluation_batches",
    "load_dataset",
    "parse_augmentation",
    "split_hash",
    "stratified_split",
]
