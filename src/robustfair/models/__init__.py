"""Networks with their normalisation inside, their heads, and their weights."""

from robustfair.models.build import build_model, create_model, describe_model
from robustfair.models.head import Head, OnCopies, check_outputs, find_head, head_norms, laid_out, prepared, unwrap
from robustfair.models.networks.dm_wide_resnet import DMWideResNet
from robustfair.models.networks.preact_resnet import PreActResNet18
from robustfair.models.networks.resnet9 import ResNet9
from robustfair.models.networks.resnet18 import ResNet18
from robustfair.models.networks.small_cnn import SmallCNN
from robustfair.models.networks.wide_resnet import WideResNet
from robustfair.models.networks.xcit import XCiT
from robustfair.models.normalise import Normalise, Normalised
from robustfair.models.weights import LoadReport, load_weights, read_weight_file

__all__ = [
    "DMWideResNet",
    "Head",
    "LoadReport",
    "Normalise",
    "Normalised",
    "OnCopies",
    "PreActResNet18",
    "ResNet9",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "XCiT",
    "build_model",
    "check_outputs",
    "create_model",
    "describe_model",
    "find_head",
    "head_norms",
    "laid_out",
    "load_weights",
    "prepared",
    "read_weight_file",
    "unwrap",
]
