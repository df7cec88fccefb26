"""Undocumented names of TensorBoard's HPARAMS tab, whose documentation is for TensorFlow.

Non-public: ``tensorboard.plugins.hparams.metadata``, ``tensorboard.plugins.hparams.api_pb2`` and
``tensorboard.plugins.hparams.plugin_data_pb2`` (tensorboard 2.21). torch imports the same. Without them the tab would
show no run: ``SummaryWriter.add_hparams`` creates a new folder at each call, and cannot set columns.
"""

from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

__all__ = [
    "DATA_TYPE_FLOAT64",
    "DATA_TYPE_STRING",
    "STATUS_SUCCESS",
    "Experiment",
    "HParamInfo",
    "HParamsPluginData",
    "MetricInfo",
    "MetricName",
    "SessionEndInfo",
    "SessionStartInfo",
    "metadata",
]
