"""LightningModules with a backbone that computes features, a linear head, and the objective of Problem (2)."""

from nclightning.models.backbones import FeatureTable, TwoLayerBody
from nclightning.models.classifier import RegularizedClassifier
from nclightning.models.mlp import TwoLayerMLP
from nclightning.models.ufm import UFM

__all__ = ["UFM", "FeatureTable", "RegularizedClassifier", "TwoLayerBody", "TwoLayerMLP"]
