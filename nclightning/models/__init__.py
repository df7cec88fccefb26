"""LightningModules: a backbone that makes features, a linear head, and the objective of Problem (2)."""

from nclightning.models.backbones import FeatureTable
from nclightning.models.classifier import UFM, RegularizedClassifier

__all__ = ["UFM", "FeatureTable", "RegularizedClassifier"]
