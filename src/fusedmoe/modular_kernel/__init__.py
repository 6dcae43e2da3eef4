"""The contract between prepare, experts and finalize, and the kernel that composes one of each.

    hidden_states -> prepare (quantize, dispatch) -> experts (GEMM1, activation, GEMM2) -> finalize

A prepare/finalize knows how tokens move between ranks, an experts implementation how two grouped
GEMMs run on one device; neither knows the other, only the records.
"""

from fusedmoe.modular_kernel.capabilities import ExpertsCapabilities
from fusedmoe.modular_kernel.experts import (
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
)
from fusedmoe.modular_kernel.kernel import FusedMoEKernel, FusedMoEMonolithicKernel
from fusedmoe.modular_kernel.prepare_finalize import (
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
)
from fusedmoe.modular_kernel.records import (
    ExpertsWork,
    ExpertTokensMetadata,
    FinalizeWork,
    FusedMoEActivationFormat,
    Hook,
    MonolithicPrepareResult,
    PrepareResult,
    PrepareWork,
    ProblemSize,
    Receiver,
    WorkspaceShapes,
    scratch,
)
from fusedmoe.modular_kernel.workspace import WorkspacePlan, plan_workspaces

__all__ = [
    "ExpertTokensMetadata",
    "ExpertsCapabilities",
    "ExpertsWork",
    "FinalizeWork",
    "FusedMoEActivationFormat",
    "FusedMoEExperts",
    "FusedMoEExpertsModular",
    "FusedMoEExpertsMonolithic",
    "FusedMoEKernel",
    "FusedMoEMonolithicKernel",
    "FusedMoEPrepareAndFinalize",
    "FusedMoEPrepareAndFinalizeModular",
    "FusedMoEPrepareAndFinalizeMonolithic",
    "Hook",
    "MonolithicPrepareResult",
    "PrepareResult",
    "PrepareWork",
    "ProblemSize",
    "Receiver",
    "WorkspacePlan",
    "WorkspaceShapes",
    "plan_workspaces",
    "scratch",
]
