"""The data sets that have a name: where the Hugging Face hub keeps them, and what their columns are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from robustfair.registry import canonical

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One named data set.

    Attributes:
        name: canonical name, as the user types it.
        summary: one line for listings.
        num_classes: C; a source with another number is refused.
        hub: repository on the hub; empty for embedded data.
        config: configuration of that repository; a local folder may hold it as a sub-folder of that name.
        image: column of the images.
        label: column of the class index.
        coarse: column of the super-class index; empty without one.
        parts: what a load gives. `("train",)` or `("test",)` alone: the whole source is that part.
        holdout: share of the train part that becomes the test part, for sources that ship only one; 0 for none.
        image_size: side in pixels that images are brought to where the user gives none; None keeps theirs.
        augment: default augmentation, a key of `robustfair.data.augment.crops.AUGMENTATIONS`.
        folders: further folder names to look for under ROBUSTFAIR_DATA.
        selectors: columns whose values follow the name, as in `cifar10-c/gaussian_noise/3`.
        class_names: names where the source has none.
    """

    name: str
    summary: str
    num_classes: int
    hub: str = ""
    config: str | None = None
    image: str = "image"
    label: str = "label"
    coarse: str = ""
    parts: tuple[str, ...] = ("train", "test")
    holdout: float = 0.0
    image_size: int | None = None
    augment: str = "crop-flip"
    folders: tuple[str, ...] = ()
    selectors: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def folder_names(self) -> frozenset[str]:
        """Canonical names of the folders that may hold this data set."""
        return frozenset(self._folder_names)

    def rank(self, folder: str) -> int:
        """Place of a folder among those that may hold this data set: the first of them is read."""
        return self._folder_names.index(canonical(folder))

    @property
    def _folder_names(self) -> list[str]:
        return [canonical(name) for name in (self.name, self.hub.rpartition("/")[2], *self.folders) if name]


_ENTRIES = (
    CatalogEntry(name="digits", summary="1,797 grey 8x8 digits, embedded", num_classes=10, holdout=0.2, augment="none"),
    CatalogEntry(
        name="cifar10",
        summary="60,000 colour 32x32 photographs",
        num_classes=10,
        hub="uoft-cs/cifar10",
        image="img",
        folders=("cifar-10-batches-py", "cifar-10-batches-bin"),
        class_names=CIFAR10_CLASSES,
    ),
    CatalogEntry(
        name="cifar100",
        summary="60,000 colour 32x32 photographs, 20 super-classes",
        num_classes=100,
        hub="uoft-cs/cifar100",
        image="img",
        label="fine_label",
        coarse="coarse_label",
        folders=("cifar-100-python", "cifar-100-binary"),
    ),
    CatalogEntry(name="stl10", summary="13,000 colour 96x96 photographs", num_classes=10, hub="tanganke/stl10"),
    CatalogEntry(
        name="svhn",
        summary="99,289 colour 32x32 house numbers; the extra part is left out",
        num_classes=10,
        hub="ufldl-stanford/svhn",
        config="cropped_digits",
        augment="crop",
    ),
    CatalogEntry(
        name="fashion-mnist",
        summary="70,000 grey 28x28 pieces of clothing",
        num_classes=10,
        hub="zalando-datasets/fashion_mnist",
        folders=("FashionMNIST",),
        augment="crop",
    ),
    CatalogEntry(
        name="tiny-imagenet",
        summary="110,000 colour 64x64 photographs; the validation part is the test part",
        num_classes=200,
        hub="zh-plus/tiny-imagenet",
        folders=("tiny-imagenet-200",),
    ),
    CatalogEntry(
        name="office-home",
        summary="15,588 pictures of 65 objects in four styles, 20 % per class held out as the test part",
        num_classes=65,
        hub="flwrlabs/office-home",
        parts=("train",),
        holdout=0.2,
        image_size=224,
    ),
    CatalogEntry(
        name="cifar10-c",
        summary="CIFAR-10 test images under a corruption, as in cifar10-c/gaussian_noise/3",
        num_classes=10,
        hub="robro/cifar10-c-parquet",
        parts=("test",),
        folders=("CIFAR-10-C",),
        selectors=("corruption_name", "corruption_level"),
        class_names=CIFAR10_CLASSES,
    ),
)

CATALOG: Mapping[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}
