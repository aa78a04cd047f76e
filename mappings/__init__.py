"""The mapping registry: which axes of a Megatron parameter are which axes of which Hugging Face tensors.

`layout` and `equation` are the notation, `mapping` the named equations, `implied` the axes that names alone stand for,
`registry` the look-up, `qwen3_vl` the tables.
"""

from qwen3vl_convert.mappings.equation import Equation, Pair, Term
from qwen3vl_convert.mappings.layout import Axis, Layout, View
from qwen3vl_convert.mappings.mapping import (
    EXPERT_LAYOUTS,
    AutoMapping,
    ConcatenatedQKVMapping,
    ExpertMLPDownProjMapping,
    ExpertMLPGateUpProjMapping,
    FusedExpertMapping,
    FusedGatedExpertMapping,
    GatedMLPMapping,
    Mapping,
    QKVMapping,
    ReplicatedMapping,
)
from qwen3vl_convert.mappings.registry import (
    Claim,
    MegatronMappingRegistry,
    mapping_registry,
    register_mapping,
    unregister_mapping,
)

__all__ = [
    "EXPERT_LAYOUTS",
    "AutoMapping",
    "Axis",
    "Claim",
    "ConcatenatedQKVMapping",
    "Equation",
    "ExpertMLPDownProjMapping",
    "ExpertMLPGateUpProjMapping",
    "FusedExpertMapping",
    "FusedGatedExpertMapping",
    "GatedMLPMapping",
    "Layout",
    "Mapping",
    "MegatronMappingRegistry",
    "Pair",
    "QKVMapping",
    "ReplicatedMapping",
    "Term",
    "View",
    "mapping_registry",
    "register_mapping",
    "unregister_mapping",
]
