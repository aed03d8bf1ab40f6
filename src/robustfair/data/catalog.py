"""The data sets that have a name: where the Hugging Face hub keeps them, and what their columns are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from robustfair.registry import canonical

DOMAINS = ("Art", "Clipart", "Product", "Real World")
"""The styles of OfficeHome: its folders, and the values of the column `domain` on the hub."""
UNLABELLED = "unlabelled"
"""The one class of images without labels: no network trains on it, a teacher labels them first."""
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One named data set.

    Attributes:
        name: canonical name, as the user types it.
        summary: one line for listings.
        num_classes: C; a source with another number is refused.
        hub: repository on the hub; empty for embedded data, and for what is read from local files alone.
        config: configuration of that repository; a local folder may hold it as a sub-folder of that name.
        image: column of the images.
        label: column of the class index.
        coarse: column of the super-class index; empty without one.
        parts: what a load gives. `("train",)` or `("test",)` alone: the whole source is that part.
        holdout: share of the train part that becomes the test part, for sources that ship only one; 0 for none.
        image_size: side in pixels that images are brought to where the user gives none; None keeps theirs.
        augment: default augmentation, a key of `robustfair.data.augment.crops.AUGMENTATIONS`.
        only: the one part that is read of a source that has others too; empty for all of them.
        folders: further folder names to look for under ROBUSTFAIR_DATA.
        layout: what such a folder holds, for messages; empty where it may hold any layout.
        domains: its folders, each with a folder a class, that are read together.
        part_lists: files in it, by part, that list images and their class indices.
        class_lists: files in it, any of which may name the classes that are read.
        images_of: name of the data set whose folder holds the images of such lists, where this one's does not.
        unlabelled: its file of images without labels, which alone is read.
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
    only: Literal["", "test"] = ""
    folders: tuple[str, ...] = ()
    layout: str = ""
    domains: tuple[str, ...] = ()
    part_lists: Mapping[str, str] = field(default_factory=dict)
    class_lists: tuple[str, ...] = ()
    images_of: str = ""
    unlabelled: str = ""
    selectors: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def shares_folder(self) -> bool:
        """Whether the folder that holds it holds other rows of the catalogue too."""
        return bool(self.selectors or self.domains) or "/" in self.name

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


_OFFICE_HOME = CatalogEntry(
    name="office-home",
    summary="15,588 pictures of 65 objects in four styles, 20 % per class held out as the test part",
    num_classes=65,
    hub="flwrlabs/office-home",
    parts=("train",),
    holdout=0.2,
    image_size=224,
    folders=("OfficeHomeDataset_10072016",),
    layout=", ".join(f"{domain}/<class>/" for domain in DOMAINS),
    domains=DOMAINS,
)
_IMAGENET = CatalogEntry(
    name="imagenet",
    summary="1,331,167 photographs of 1,000 classes, all in memory: 200 GB at 224x224, 16 GB at 64x64",
    num_classes=1000,
    hub="ILSVRC/imagenet-1k",
    image_size=224,
    folders=("ILSVRC2012", "ILSVRC", "imagenet-1k"),
    layout="train/<wnid>/ and val/<wnid>/; or val/ with all images in it beside ILSVRC2012_devkit_t12/data/ or "
    "LOC_val_solution.csv",
)
_LIST_WORDS = {"train": "train", "validation": "val", "test": "test"}

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
    CatalogEntry(
        name="stl10",
        summary="13,000 colour 96x96 photographs",
        num_classes=10,
        hub="tanganke/stl10",
        folders=("stl10_binary",),
    ),
    CatalogEntry(
        name=f"stl10/{UNLABELLED}",
        summary="STL-10's 100,000 photographs without labels, for the edit pseudo-label; from the original files alone",
        num_classes=1,
        parts=("train",),
        folders=("stl10", "stl10_binary"),
        layout="stl10_binary/unlabeled_X.bin",
        unlabelled="unlabeled_X.bin",
        class_names=(UNLABELLED,),
    ),
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
    _OFFICE_HOME,
    *(
        replace(
            _OFFICE_HOME,
            name=f"office-home/{canonical(domain)}",
            summary=f"OfficeHome's pictures of the domain {domain}, 20 % per class held out as the test part",
            domains=(domain,),
            folders=("office-home", *_OFFICE_HOME.folders),
        )
        for domain in DOMAINS
    ),
    _IMAGENET,
    replace(
        _IMAGENET,
        name="imagenet/val",
        summary="ImageNet's 50,000 validation photographs alone, to audit on: 7.5 GB at 224x224",
        hub="",
        only="test",
        folders=("imagenet", *_IMAGENET.folders),
    ),
    replace(
        _IMAGENET,
        name="imagenet-100",
        summary="ImageNet photographs of 100 classes, which a folder or a list of yours names",
        num_classes=100,
        hub="",
        folders=("imagenet100",),
        layout="train/<wnid>/ and val/<wnid>/ of 100 classes, or imagenet100.txt with 100 wnids, a line each, and "
        "imagenet/ beside it",
        class_lists=("imagenet100.txt", "imagenet-100.txt"),
        images_of="imagenet",
    ),
    replace(
        _IMAGENET,
        name="imagenet-lt",
        summary="115,846 ImageNet photographs under a long tail, 1,280 to 5 a class; 50,000 to test on",
        hub="",
        folders=(),
        layout="ImageNet_LT_train.txt and ImageNet_LT_test.txt, with train/ and val/ of ImageNet in it or in imagenet/ "
        "beside it",
        part_lists={part: f"ImageNet_LT_{word}.txt" for part, word in _LIST_WORDS.items()},
        images_of="imagenet",
    ),
    CatalogEntry(
        name="cifar10-c",
        summary="CIFAR-10 test images under a corruption or a set of them, as in cifar10-c/gaussian_noise/3",
        num_classes=10,
        hub="robro/cifar10-c-parquet",
        parts=("test",),
        folders=("CIFAR-10-C",),
        selectors=("corruption_name", "corruption_level"),
        class_names=CIFAR10_CLASSES,
    ),
)

CATALOG: Mapping[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}
