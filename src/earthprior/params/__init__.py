"""params.yaml as typed records: the only reader of that file.

All faults are reported at once, each with its dotted key, the value, what is allowed and, for a misspelt key, the
nearest known one. ruamel.yaml is used because DVC itself reads and writes the file with it: PyYAML takes the `1e-05`
that DVC writes for a string.
"""

from earthprior.params.acting import active, evaluation, flatten, known_keys, unchecked
from earthprior.params.chips import (
    AS_THEY_ARE,
    CLIP_PERCENTS,
    AugmentationParams,
    DataParams,
    FileParams,
    NormalizationParams,
)
from earthprior.params.downstream import DownstreamParams, downstream_fields
from earthprior.params.kinds import Section
from earthprior.params.learning import DiffusionParams
from earthprior.params.reading import load, load_downstream, parse, parse_downstream, read_mapping
from earthprior.params.search import TuneParams
from earthprior.params.training import LearningParams
from earthprior.params.whole import SELECTORS, EvaluateParams, Params, fields

__all__ = [
    "AS_THEY_ARE",
    "CLIP_PERCENTS",
    "SELECTORS",
    "AugmentationParams",
    "DataParams",
    "DiffusionParams",
    "DownstreamParams",
    "EvaluateParams",
    "FileParams",
    "LearningParams",
    "NormalizationParams",
    "Params",
    "Section",
    "TuneParams",
    "active",
    "downstream_fields",
    "evaluation",
    "fields",
    "flatten",
    "known_keys",
    "load",
    "load_downstream",
    "parse",
    "parse_downstream",
    "read_mapping",
    "unchecked",
]
