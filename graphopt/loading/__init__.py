"""Loading models from files that are not trusted, and looking into them.

Nothing in a file runs unless the caller says so: pickles go through torch's weights-only reader,
archives are scanned before torch opens them, and what torch would evaluate (see
:mod:`graphopt.loading.pt2_program`) is checked first.
"""

from graphopt.loading.facts import FileFacts
from graphopt.loading.findings import Finding, Limits
from graphopt.loading.inspection import inspect_file
from graphopt.loading.model import LoadedModel, load_model
from graphopt.loading.onnx_files import check_external_data
from graphopt.loading.scan import ArchiveScan, scan_archive
from graphopt.loading.tensors import check_tensors
from graphopt.loading.yaml_files import check_keys, safe_yaml

__all__ = [
    "ArchiveScan",
    "FileFacts",
    "Finding",
    "Limits",
    "LoadedModel",
    "check_external_data",
    "check_keys",
    "check_tensors",
    "inspect_file",
    "load_model",
    "safe_yaml",
    "scan_archive",
]
